"""A bundle equals itself, whatever noise its scheduler draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qdeploy.base.files import hash_file
from qdeploy.reporting.fidelity import measure_fidelity
from qdeploy.runtime.pipeline import load
from qdeploy.sampling import replace_scheduler


def test_a_bundle_equals_itself(float_bundle: Path) -> None:
    with load(float_bundle) as first, load(float_bundle) as second:
        fidelity = measure_fidelity(first, second, ["a cat"], steps=3)
    assert set(fidelity.step_sqnr_db) == {float("inf")}
    assert fidelity.image_psnr_db == float("inf")


def test_a_bundle_equals_itself_with_a_stochastic_scheduler(float_bundle: Path, tmp_path: Path) -> None:
    """Its pictures draw the noise that the comparison's own trajectory drew."""
    bundle = tmp_path / "bundle"
    shutil.copytree(float_bundle, bundle)
    scheduler = bundle / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(replace_scheduler(json.loads(scheduler.read_text()), "euler-a")))
    manifest = json.loads((bundle / "manifest.json").read_text())
    (entry,) = [entry for entry in manifest["files"] if entry["path"] == "scheduler/scheduler_config.json"]
    entry.update(bytes=scheduler.stat().st_size, sha256=hash_file(scheduler))
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with load(bundle) as first, load(bundle) as second:
        assert measure_fidelity(first, second, ["a cat", "a dog"], steps=3).image_psnr_db == float("inf")
