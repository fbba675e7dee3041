"""Figures are computed from raw samples, and the report shows each beside its twin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qdeploy.bench.environment import environment
from qdeploy.bench.fidelity import Fidelity, compare
from qdeploy.bench.fresh_start import peak_bytes
from qdeploy.bench.latency import BenchSettings, BundleFigures, distinct_names, fresh_start
from qdeploy.bench.report import markdown, rows_of, write_json
from qdeploy.errors import EngineError
from qdeploy.files import sha256_of
from qdeploy.runtime.pipeline import load
from qdeploy.sampling import with_scheduler


def figures(name: str, precision: str, step_ms: float) -> BundleFigures:
    samples = {"unet step": [step_ms, step_ms * 3, step_ms * 2], "picture": [step_ms * 100]}
    return BundleFigures(
        name, name, precision, "ort-cpu", 4_000_000, 0.5, samples, [10.0, 30.0, 20.0], [5_000_000, 7_000_000]
    )


def test_rows_hold_percentiles_ratio_and_fidelity() -> None:
    pair = [figures("a", "fp32", 10.0), figures("b", "int8", 5.0)]
    header, rows = rows_of(pair, {"b": Fidelity((20.0, 30.0), (900, 100), 33.3)})
    table = {row[0]: row[1:] for row in rows}
    assert header == ("", "a", "b", "a / b")
    assert table["unet step, ms p50"] == ("20.0", "10.0", "2.00x")
    assert table["unet step, ms p90"] == ("28.0", "14.0", "2.00x")
    assert table["load (fresh process), ms p50"] == ("20", "20", "1.00x")
    assert table["peak memory, MB"] == ("7", "7", "1.00x")
    assert table["per-step SQNR, dB mean"][:2] == ("-", "25.0")
    assert table["per-step SQNR, dB worst"][:2] == ("-", "20.0")
    assert {len(row) for row in rows} == {4}
    assert markdown(header, rows).count("\n") == len(rows) + 2


def test_bundles_of_one_name_are_told_apart() -> None:
    assert distinct_names([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert distinct_names([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]


def test_three_bundles_have_no_ratio() -> None:
    header, rows = rows_of([figures(name, "int8", 1.0) for name in "abc"], {})
    assert header == ("", "a", "b", "c")
    assert {len(row) for row in rows} == {4}


def test_json_keeps_the_raw_samples(tmp_path: Path) -> None:
    write_json(tmp_path / "b.json", [figures("a", "fp32", 1.0)], {}, environment(["ort-cpu"], 2))
    document = json.loads((tmp_path / "b.json").read_text())
    assert document["bundles"][0]["samples_ms"]["unet step"] == [1.0, 3.0, 2.0]
    assert "onnxruntime" in document["environment"]


def test_a_fresh_process_reports_its_own_peak(float_bundle: Path) -> None:
    import numpy as np

    ballast = np.ones(400_000_000, np.uint8)  # must not show in the child's figure
    found = fresh_start(float_bundle, BenchSettings(steps=2))
    assert 20e6 < found["peak_bytes"] < 400e6 < peak_bytes()
    assert found["load_ms"] > 0
    del ballast


def test_a_bundle_that_fails_in_a_fresh_process_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not a qdeploy bundle"):
        fresh_start(tmp_path, BenchSettings())


def test_a_bundle_equals_itself(float_bundle: Path) -> None:
    with load(float_bundle) as first, load(float_bundle) as second:
        fidelity = compare(first, second, ["a cat"], steps=3)
    assert set(fidelity.step_sqnr_db) == {float("inf")}
    assert fidelity.image_psnr_db == float("inf")


def test_a_bundle_equals_itself_with_a_stochastic_sampler(float_bundle: Path, tmp_path: Path) -> None:
    """Its pictures draw the noise that the comparison's own trajectory drew."""
    bundle = tmp_path / "bundle"
    shutil.copytree(float_bundle, bundle)
    scheduler = bundle / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(with_scheduler(json.loads(scheduler.read_text()), "euler-a")))
    manifest = json.loads((bundle / "manifest.json").read_text())
    (entry,) = [entry for entry in manifest["files"] if entry["path"] == "scheduler/scheduler_config.json"]
    entry.update(bytes=scheduler.stat().st_size, sha256=sha256_of(scheduler))
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with load(bundle) as first, load(bundle) as second:
        assert compare(first, second, ["a cat", "a dog"], steps=3).image_psnr_db == float("inf")
