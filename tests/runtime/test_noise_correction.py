"""A bundle's noise correction is applied to every UNet output, and a bad one is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import qdeploy
from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.manifest import write_manifest
from qdeploy.artifacts.noise_correction import BUNDLE_FILE, NoiseCorrection, save_noise_correction
from qdeploy.base.errors import BundleError
from qdeploy.runtime.pipeline import Pipeline


@pytest.fixture
def bundle(float_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(float_bundle, tmp_path / "bundle"))


def correction(channels: int = 4) -> NoiseCorrection:
    mean = np.linspace(-1, 1, 2 * channels, dtype=np.float32).reshape(2, channels)
    return NoiseCorrection(np.array([100, 900]), np.array([0.25, -0.25], np.float32), mean)


def add_correction(bundle: Path, correction: NoiseCorrection) -> Path:
    manifest = open_bundle(bundle).manifest
    save_noise_correction(bundle / BUNDLE_FILE, correction)
    write_manifest(bundle, manifest)
    return bundle


def predict(pipeline: Pipeline, t: int) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((3, *pipeline.latents.shape), np.float32)
    return pipeline.predict(x, t, np.repeat(pipeline.encode(["a cat"]), 3, axis=0))


def test_a_listed_correction_is_applied_at_each_timestep(bundle: Path, float_bundle: Path) -> None:
    with qdeploy.load(float_bundle) as plain, qdeploy.load(add_correction(bundle, correction())) as corrected:
        for t in (1, 500, 900):
            assert np.array_equal(predict(corrected, t), correction().apply(predict(plain, t), t))
        assert not np.array_equal(plain("a cat", steps=2).latents, corrected("a cat", steps=2).latents)


def test_a_correction_that_the_manifest_does_not_list_is_refused(bundle: Path) -> None:
    (bundle / BUNDLE_FILE).write_bytes(b"anything")
    with pytest.raises(BundleError, match=r"holds 'unet/noise_correction\.safetensors', which manifest\.json does not"):
        qdeploy.load(bundle)


def test_a_correction_of_other_channels_is_refused(bundle: Path) -> None:
    with pytest.raises(BundleError, match="corrects 3 channels, the UNet's output has 4"):
        qdeploy.load(add_correction(bundle, correction(channels=3)))


def test_a_broken_correction_is_refused(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    (bundle / BUNDLE_FILE).write_bytes(b"no safetensors")
    write_manifest(bundle, manifest)
    with pytest.raises(BundleError, match=r"noise_correction\.safetensors is refused"):
        qdeploy.load(bundle)
