"""A latent-diffusion model without text the whole way: LDMPipeline folder to pictures, and diffusers' pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import qdeploy
from qdeploy.artifacts.bundle import open_bundle
from qdeploy.base.errors import BundleError, UsageError
from qdeploy.cli import main
from qdeploy.reporting.fidelity import measure_fidelity
from tests.shared_artifacts import build_once

STEPS = 6


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["--quiet", *map(str, arguments)])


def run_checked(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@build_once("made", traces=True)
def unconditional_made(out: Path, unconditional_folder: Path) -> None:
    """A folder with the calibration set, the table and both bundles, made by the commands."""
    out.mkdir()
    calib, table = out / "c.safetensors", out / "q.safetensors"
    run_checked("calibrate", unconditional_folder, "-o", calib, "--samples", 4, "--steps", STEPS, "--record", STEPS)
    said = run_checked("quantize", unconditional_folder, "--calib", calib, "-o", table)
    assert "text_encoder" not in said
    run_checked("export", table, "-o", out / "w8a8")
    run_checked("export", unconditional_folder, "-o", out / "fp32")


def test_same_pictures_as_diffusers_within_one_grey_level(unconditional_made: Path, unconditional_folder: Path) -> None:
    from diffusers import LDMPipeline

    reference = LDMPipeline.from_pretrained(unconditional_folder)
    reference.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=STEPS, output_type="np")
    expected = reference(batch_size=2, generator=torch.manual_seed(3), **options).images
    latents = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(3)).numpy()
    with qdeploy.load(unconditional_made / "fp32") as pipe:
        actual = pipe(count=2, steps=STEPS, latents=latents)
    assert np.abs(actual.pixels.astype(int) - np.rint(expected * 255)).max() <= 1


def test_one_unet_call_a_step_and_seeds(unconditional_made: Path) -> None:
    manifest = open_bundle(unconditional_made / "w8a8").manifest
    assert manifest.kind == "unconditional"
    assert set(manifest.components) == {"unet", "vae_decoder"}
    assert set(manifest.components["unet"].inputs) == {"sample", "timestep"}
    assert manifest.components["unet"].inputs["sample"].shape[0] == 1
    assert not (unconditional_made / "w8a8" / "tokenizer").exists()
    with qdeploy.load(unconditional_made / "w8a8") as pipe:
        several = pipe(count=3, steps=3, seed=7)
        assert several.seeds == ((7, 0), (7, 1), (7, 2))
        assert np.array_equal(several.pixels[:1], pipe(steps=3, seed=7).pixels)
        assert not np.array_equal(several.pixels[0], several.pixels[1])
        assert np.array_equal(several.pixels, pipe(count=3, steps=3, seed=7, guidance_scale=1.0).pixels)
        assert np.array_equal(pipe(steps=3, seed=[9, 7]).pixels[1:], several.pixels[:1])
        with pytest.raises(UsageError, match="no text encoder"):
            pipe.encode([""])


def test_int8_is_near_its_float_reference(unconditional_made: Path, float_bundle: Path) -> None:
    with qdeploy.load(unconditional_made / "fp32") as reference, qdeploy.load(unconditional_made / "w8a8") as tested:
        fidelity = measure_fidelity(reference, tested, ["not read"], steps=4)
        with qdeploy.load(float_bundle) as other, pytest.raises(BundleError, match="not of one model"):
            measure_fidelity(reference, other, ["a cat"], steps=1)
    assert len(fidelity.step_sqnr_db) == 4
    assert min(fidelity.step_sqnr_db) > 15


def test_generate_and_bench(unconditional_made: Path, tmp_path: Path) -> None:
    run_checked(
        "generate", unconditional_made / "w8a8", "-o", tmp_path / "out.png", "--count", 4, "--steps", 2, "--eta", 1
    )
    assert all((tmp_path / f"out-{number}.png").stat().st_size > 0 for number in range(4))
    report = tmp_path / "bench.json"
    quick = ("--rounds", 3, "--pictures", 1, "--steps", 2, "--fresh-starts", 1, "--concurrency", 2)
    run_checked("bench", unconditional_made / "fp32", unconditional_made / "w8a8", *quick, "--json", report)
    w8a8 = json.loads(report.read_text())["contenders"][1]
    assert list(w8a8["samples"]) == ["unet step", "vae decode", "picture"]
    assert len(w8a8["pictures_per_s"]["2"]) == 5
    assert len(w8a8["fidelity"]["step_sqnr_db"]) == 2


@pytest.mark.parametrize(("name", "words"), [("c.safetensors", "unconditional"), ("q.safetensors", "conv_in")])
def test_inspect(unconditional_made: Path, name: str, words: str) -> None:
    assert words in run_checked("inspect", unconditional_made / name)
    assert "text_encoder" not in run_checked("inspect", unconditional_made / "w8a8")


def test_inspect_the_model(unconditional_folder: Path) -> None:
    shown = run_checked("inspect", unconditional_folder)
    assert "unconditional" in shown
    assert "tokens" not in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a cat",), "got a prompt, expected none"),
        (("--guidance", "7.5"), "got --guidance, expected none"),
        (("a cat", "--negative-prompt", "dog"), "got a prompt, --negative, expected none"),
        (("--guidance-interval", "0.2", "0.8"), "got --guidance-interval, expected none"),
    ],
)
def test_text_for_an_unconditional_bundle(
    unconditional_made: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = run("generate", unconditional_made / "w8a8", *arguments, "-o", tmp_path / "x.png")
    assert (result.exit_code, words in result.output) == (2, True), result.output
    with qdeploy.load(unconditional_made / "fp32") as pipe, pytest.raises(UsageError, match="expected none"):
        pipe("a cat")
    with qdeploy.load(unconditional_made / "fp32") as pipe, pytest.raises(UsageError, match="got guidance_interval"):
        pipe(guidance_interval=(0.2, 0.8))


def test_no_text_for_a_text_bundle(float_bundle: Path, tmp_path: Path) -> None:
    result = run("generate", float_bundle, "-o", tmp_path / "x.png")
    assert (result.exit_code, "no prompt" in result.output) == (2, True), result.output
    with qdeploy.load(float_bundle) as pipe, pytest.raises(UsageError, match="no prompt"):
        pipe()


@pytest.mark.parametrize("arguments", [("--guidance", 3), ("--prompts", "p.txt"), ("--guidance-interval", 0.2, 0.8)])
def test_calibrating_with_text_options(unconditional_folder: Path, tmp_path: Path, arguments: tuple) -> None:
    result = run("calibrate", unconditional_folder, "-o", tmp_path / "c", *arguments)
    assert (result.exit_code, "is unconditional" in result.output) == (2, True), result.output


def test_a_bundle_of_another_kind(unconditional_made: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(unconditional_made / "fp32", tmp_path / "bundle")
    document = json.loads((folder / "manifest.json").read_text())
    for kind, words in (("video", "kind 'video'"), ("text-to-image", "without text_encoder")):
        (folder / "manifest.json").write_text(json.dumps(document | {"kind": kind}))
        with pytest.raises(BundleError, match=words):
            open_bundle(folder)
