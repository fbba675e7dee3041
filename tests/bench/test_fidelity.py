"""A bundle equals itself, whatever noise its sampler draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qdeploy.bench.fidelity import compare
from qdeploy.files import sha256_of
from qdeploy.runtime.pipeline import load
from qdeploy.sampling import with_scheduler


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
