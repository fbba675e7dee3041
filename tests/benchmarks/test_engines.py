"""The comparison of engines from end to end, on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import engines
from qdeploy.artifacts.table import QuantTable, save_table


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
