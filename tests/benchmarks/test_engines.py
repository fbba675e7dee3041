"""The comparison of engines from end to end, on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import engines
from qdeploy.artifacts.table import QuantTable, save_table
from tests.installed import load_or_skip


@pytest.mark.slow
def test_rows_are_made_run_and_reported(
    table: QuantTable, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_table(table, tmp_path / "table.safetensors")
    monkeypatch.setattr(engines, "HERE", tmp_path)
    work = ["--model", str(tiny_folder), "--table", str(tmp_path / "table.safetensors"), "--work", str(tmp_path / "w")]
    rows = ["fp32", "quantize_static", "qdeploy-w8a8", "qdeploy-w4a8-openvino"]
    chosen = [word for row in rows for word in ("--only", row)]
    result = CliRunner().invoke(engines.main, [*work, *chosen, "--rounds", "1", "--threads", "1"])
    assert result.exit_code == 0, result.output
    told = {row["row"]: row for row in json.loads((tmp_path / "engines-builtin.json").read_text())["rows"]}
    assert list(told) == rows
    assert told["fp32"]["file_bytes"] > told["qdeploy-w8a8"]["file_bytes"] > told["qdeploy-w4a8-openvino"]["file_bytes"]
    assert told["qdeploy-w8a8"]["sqnr_db"] > told["qdeploy-w4a8-openvino"]["sqnr_db"] > 0
    assert told["quantize_static"]["sqnr_db"] is None
    assert all(row["step_seconds"] > 0 and row["peak_rss_bytes"] > 0 for row in told.values())


@pytest.mark.slow
def test_rows_of_the_engines_for_phones(table: QuantTable, tiny_folder: Path, tmp_path: Path) -> None:
    """Their files are of several parts; ``--out`` leaves the other rows' report as it is."""
    load_or_skip("ncnn")
    load_or_skip("litert")
    save_table(table, tmp_path / "table.safetensors")
    rows = ["fp32", "qdeploy-w8a8", "fp16-ncnn", "qdeploy-w8a8-ncnn", "fp32-litert", "qdeploy-w8a8-litert"]
    command = [
        "--model", str(tiny_folder), "--table", str(tmp_path / "table.safetensors"), "--work", str(tmp_path / "w"),
        "--out", str(tmp_path / "phones.json"), "--rounds", "1", "--threads", "1",
        *(word for row in rows for word in ("--only", row)),
    ]  # fmt: skip
    result = CliRunner().invoke(engines.main, command)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "phones.json").read_text())
    told = {row["row"]: row for row in report["rows"]}
    assert list(told) == rows
    assert {"ncnn", "ai-edge-litert"} <= set(report["environment"]["packages"])
    for name in ("ncnn", "litert"):
        floats, integers = (row for row in told.values() if row["engine"] == name)
        files = [path for path in (tmp_path / "w" / integers["row"]).iterdir() if path.name.startswith("model.")]
        assert integers["file_bytes"] == sum(path.stat().st_size for path in files)
        assert floats["file_bytes"] > integers["file_bytes"]
        assert floats["sqnr_db"] > integers["sqnr_db"] > 0
        assert all(row["load_seconds"] > 0 and row["peak_rss_bytes"] > 0 for row in (floats, integers))
