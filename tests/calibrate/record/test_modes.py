"""`qdeploy calibrate` in each mode as a user types it, and the combinations it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from qdeploy.base.errors import UsageError
from qdeploy.calibrate.dataset_file import load_calibration
from qdeploy.calibrate.record.modes import CalibrationRequest, calibrate_to_file
from qdeploy.calibrate.record.qdiffusion import calibration_from_qdiffusion
from qdeploy.cli import main
from qdeploy.models.source import LatentDiffusion


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["--quiet", "calibrate", *map(str, arguments)])


def test_each_mode(tiny_folder: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(pictures / "a.png")
    out = tmp_path / "c.safetensors"
    for mode, options, samples in (
        ("timestep_aware", ("--steps", 3, "--scheduler", "ddim", "--eta", 0.5, "--record", 2), 4),
        ("noise_data", (), 2),
        ("raw_data", ("--data", pictures, "--batch", 1), 2),
    ):
        result = run(tiny_folder, "-o", out, "--mode", mode, "--samples", 2, *options)
        assert result.exit_code == 0, result.output
        recording = load_calibration(out)
        assert recording.provenance["mode"] == mode
        assert len(recording.sample) == samples
        assert "unet samples" in CliRunner().invoke(main, ["inspect", str(out)]).output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.safetensors", "pictures"]


def test_to_q_diffusion_and_back(tiny_folder: Path, tmp_path: Path) -> None:
    written, out = tmp_path / "c.pt", tmp_path / "c.safetensors"
    result = run(tiny_folder, "-o", written, "--samples", 3, "--steps", 4, "--scheduler", "ddim")
    assert result.exit_code == 0, result.output
    assert len(calibration_from_qdiffusion(written).sample) == 12
    result = run(tiny_folder, "-o", out, "--from-qdiffusion", written, "--cali-st", 2, "--cali-n", 2)
    assert result.exit_code == 0, result.output
    assert len(load_calibration(out).sample) == 4
    assert "0" in CliRunner().invoke(main, ["inspect", str(out)]).output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mode", "raw_data"), "needs --data"),
        (("--data", "x"), "only with --mode raw_data"),
        (("--mode", "noise_data", "--data", "x"), "--data does not go with --mode noise_data"),
        (("--mode", "noise_data", "--guidance", 7.5), "--guidance does not go"),
        (("--mode", "noise_data", "--guidance-interval", 0.2, 0.8), "--guidance-interval does not go"),
        (("--guidance-interval", 0.8, 0.2), "guidance_interval: got (0.8, 0.2), which is reversed"),
        (("--forecast", "magic"), "got method 'magic', expected one of reuse"),
        (("--mode", "raw_data", "--data", "x", "--forecast", "reuse"), "--forecast does not go"),
        (("--guidance-interval", 0.2, 1.2), "expected at most 1"),
        (("-o", "x.pt", "--guidance-interval", 0.2, 0.8), "write a .safetensors file"),
        (("--mode", "raw_data", "--data", "x", "--record", 3), "--record does not go"),
        (("--mode", "raw_data", "--data", "x", "-o", "x.pt"), "write a .safetensors file"),
        (("--eta", 0.5, "--scheduler", "pndm"), "only ddim"),
        (("--eta", 0.5), "add --scheduler ddim"),
        (("--eta", 1.5, "--scheduler", "ddim"), "expected at most 1"),
        (("--cali-st", 3), "only with --from-qdiffusion"),
        (("--from-qdiffusion", "x.pt", "--samples", 3), "--samples does not go with --from-qdiffusion"),
        (("--from-qdiffusion", "x.pt", "--mode", "timestep_aware"), "--mode does not go"),
        (("--samples", 0), "at least 1"),
        (("--mode", "raw_data", "--data", "none"), "not a folder"),
    ],
)
def test_wrong_combinations(tiny_folder: Path, tmp_path: Path, options: tuple, words: str) -> None:
    result = run(tiny_folder, "-o", tmp_path / "c.safetensors", *options)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_unconditional_model(unconditional_model: LatentDiffusion, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    calibrate_to_file(unconditional_model, CalibrationRequest(samples=2, steps=3), out)
    assert load_calibration(out).contexts is None
    with pytest.raises(UsageError, match="--prompts"):
        calibrate_to_file(unconditional_model, CalibrationRequest(prompts=tmp_path / "p"), out)
