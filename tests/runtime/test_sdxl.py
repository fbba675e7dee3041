"""Stable Diffusion XL's pictures are diffusers': text-to-image, image-to-image, inpainting, other sizes, int8."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import qdeploy
from qdeploy.artifacts.bundle import open_bundle as read_bundle
from qdeploy.artifacts.table import load_table, save_table
from qdeploy.base.errors import RequestError, UsageError
from qdeploy.calibrate.dataset_file import load_calibration, save_calibration
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.cli import main
from qdeploy.export.exporter import export_bundle
from qdeploy.export.open_dims import OpenDims
from qdeploy.models.source import load_model
from qdeploy.runtime.pipeline import Pipeline
from qdeploy.targets.base import load_target
from tests.models.pictures import ONE_GREY_LEVEL, load_diffusers_xl, same_draws
from tests.shared_artifacts import build_once
from tests.tiny import write_tiny_sdxl

HOME = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_"
WAYS = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
PROMPTS = ["a cat!", "a red house", "rocket"]
SETTINGS: dict[str, Any] = dict(guidance_scale=5.0)


@build_once("sdxl-open", traces=True)
def sdxl_bundle(out: Path, sdxl_folder: Path) -> None:
    """In float, with the encoder and for every size."""
    dims = OpenDims(size=True)
    export_bundle(load_model(str(sdxl_folder)), None, load_target("ort-cpu"), out, with_encoder=True, open_dims=dims)


@build_once("sdxl.safetensors", traces=False)
def sdxl_table_file(out: Path, sdxl_folder: Path) -> None:
    model, recorded = load_model(str(sdxl_folder)), out.with_name("recorded.safetensors")
    settings = TimestepAwareSettings(samples=3, steps=6, record=6, batch=2)
    save_calibration(record_trajectories(model, PROMPTS, settings), recorded)
    save_table(quantize_model(model, load_calibration(recorded), QuantSpec()), out)


@build_once("sdxl-w8a8", traces=True)
def sdxl_int8_bundle(out: Path, sdxl_folder: Path, sdxl_table_file: Path) -> None:
    """With both gates, of every output of every component."""
    export_bundle(load_model(str(sdxl_folder)), load_table(sdxl_table_file), load_target("ort-cpu"), out)


@pytest.fixture(scope="module")
def xl(sdxl_bundle: Path) -> Iterator[Pipeline]:
    with qdeploy.load(sdxl_bundle) as pipeline:
        yield pipeline


@functools.cache
def load_theirs(folder: Path, way: str) -> Any:
    return load_diffusers_xl(folder, way)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Unit noise that diffusers' pipelines also start from; they take the encoder's mean, as we do."""
    drawn = np.random.default_rng(3).standard_normal((1, 4, 8, 8), np.float32)
    for module in ("img2img", "inpaint"):
        monkeypatch.setattr(f"{HOME}{module}.randn_tensor", lambda *_, **__: torch.from_numpy(drawn))
        monkeypatch.setattr(f"{HOME}{module}.retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    return drawn


def paint(folder: Path, way: str, prompt: str | list[str] = "a red house", **options: Any) -> np.ndarray:
    theirs = load_theirs(folder, way)
    with same_draws(theirs.scheduler):
        images: np.ndarray = theirs(prompt, num_inference_steps=6, output_type="np", **options).images
    return np.rint(images * 255)


def check_same(actual: qdeploy.Result, expected: np.ndarray) -> None:
    assert expected.std() > 2
    assert actual.pixels.shape == expected.shape
    assert np.abs(actual.pixels.astype(int) - expected).max() <= ONE_GREY_LEVEL


@pytest.mark.parametrize("negative", [None, "blue!"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_text_to_image(
    xl: Pipeline, sdxl_folder: Path, noise: np.ndarray, negative: str | None, guidance_scale: float
) -> None:
    """Without a negative prompt its embeddings are zeros (`force_zeros_for_empty_prompt`)."""
    options = dict(guidance_scale=guidance_scale)
    expected = paint(
        sdxl_folder, WAYS[0], latents=torch.from_numpy(noise), height=16, width=16, negative_prompt=negative, **options
    )
    check_same(xl("a red house", negative_prompt=negative or "", steps=6, latents=noise, **options), expected)


def test_sizes_and_a_batch(xl: Pipeline, sdxl_folder: Path) -> None:
    """Two prompts at once, of another size than the bundle's own, described as cut from a larger picture."""
    drawn = np.random.default_rng(4).standard_normal((2, 4, 4, 12), np.float32)
    sizes: dict[str, Any] = dict(original_size=(40, 60), target_size=(20, 30))
    expected = paint(
        sdxl_folder, WAYS[0], ["a red house", ""], negative_prompt=["", "blue"], latents=torch.from_numpy(drawn),
        height=8, width=24, crops_coords_top_left=(3, 5), **sizes, **SETTINGS,
    )  # fmt: skip
    zeros = xl(["a red house", ""], negative_prompt=["", "blue"], steps=6, latents=drawn, height=8, width=24,
               crop=(3, 5), **sizes, **SETTINGS)  # fmt: skip
    check_same(qdeploy.Result(zeros.pixels[1:], zeros.latents[1:], zeros.seeds[1:], {}, {}), expected[1:])
    plain = xl(["a red house", ""], steps=6, latents=drawn, height=8, width=24, **SETTINGS)
    assert not np.array_equal(plain.latents[0], zeros.latents[0])


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image(
    xl: Pipeline, sdxl_folder: Path, noise: np.ndarray, picture: np.ndarray, strength: float
) -> None:
    options: dict[str, Any] = dict(strength=strength, negative_prompt="blue", **SETTINGS)
    expected = paint(sdxl_folder, WAYS[1], image=Image.fromarray(picture), **options)
    check_same(xl("a red house", image=picture, steps=6, latents=noise, **options), expected)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_by_blending(
    xl: Pipeline, sdxl_folder: Path, noise: np.ndarray, picture: np.ndarray, mask: np.ndarray, strength: float
) -> None:
    expected = paint(
        sdxl_folder, WAYS[2], image=Image.fromarray(picture), mask_image=Image.fromarray(mask), height=16, width=16,
        strength=strength, **SETTINGS,
    )  # fmt: skip
    actual = xl("a red house", image=picture, mask=mask, strength=strength, steps=6, latents=noise, **SETTINGS)
    check_same(actual, expected)


@pytest.mark.exports
def test_inpainting_by_the_unet(tmp_path: Path, noise: np.ndarray, picture: np.ndarray, mask: np.ndarray) -> None:
    folder = write_tiny_sdxl(tmp_path / "model", WAYS[2], unet_channels=9)
    export_bundle(load_model(str(folder)), None, load_target("ort-cpu"), tmp_path / "bundle", with_encoder=True)
    expected = paint(
        folder, WAYS[2], image=Image.fromarray(picture), mask_image=Image.fromarray(mask), height=16, width=16,
        strength=1.0, **SETTINGS,
    )  # fmt: skip
    with qdeploy.load(tmp_path / "bundle") as nine:
        check_same(nine("a red house", image=picture, mask=mask, steps=6, latents=noise, **SETTINGS), expected)


def test_weights_change_hidden_states_and_not_the_pooled_text(xl: Pipeline) -> None:
    plain, weighted = (xl(text, steps=2, weighting=True) for text in ("(a:1) cat", "(a:1.5) cat"))
    assert np.array_equal(plain.latents, xl("a cat", steps=2).latents)
    assert not np.array_equal(weighted.latents, plain.latents)


def test_the_context_of_a_single_call(xl: Pipeline, sdxl_folder: Path) -> None:
    context = xl.make_context(["a cat", "a red house"])
    assert {name: values.shape for name, values in context.items()} == {
        "encoder_hidden_states": (2, 16, 80), "text_embeds": (2, 24), "time_ids": (2, 6),
    }  # fmt: skip
    assert context["time_ids"][1].tolist() == [16, 16, 0, 0, 16, 16]
    x = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    model = load_model(str(sdxl_folder))
    with torch.no_grad():
        tensors = {name: torch.from_numpy(values) for name, values in context.items()}
        expected = model.unet(torch.from_numpy(x), torch.tensor(500), **tensors).numpy()
    np.testing.assert_allclose(xl.predict(x, 500, context), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match=r"reads pooled text and sizes.*make_context"):
        xl.predict(x, 500, context["encoder_hidden_states"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"original_size": (16,)}, "original_size: got .*two whole numbers"),
        ({"original_size": (0, 16)}, "original_size: got 0, expected 1 or more"),
        ({"crop": (-1, 0)}, "crop: got -1"),
        ({"target_size": (10**9, 16)}, "target_size: got 1000000000, expected at most"),
        ({"crop": (0.5, 1)}, "crop: got 0.5, expected a whole number"),
    ],
)
def test_sizes_that_are_none(xl: Pipeline, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        xl("a cat", steps=1, **options)


def test_sizes_on_the_command_line(
    sdxl_bundle: Path, sdxl_folder: Path, noise: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, Any] = dict(original_size=(40, 60), target_size=(20, 30))
    own = torch.from_numpy(noise)
    options: dict[str, Any] = dict(latents=own, height=16, width=16, crops_coords_top_left=(3, 5), **sizes, **SETTINGS)
    expected = paint(sdxl_folder, WAYS[0], **options)
    monkeypatch.setattr("qdeploy.runtime.run.draw_unit_noise", lambda *_: noise)
    arguments = ["generate", str(sdxl_bundle), "a red house", "-o", str(tmp_path / "a.png"), "--steps", "6"]
    typed = ["--guidance", "5", "--original-size", "40,60", "--crop", "3,5", "--target-size", "20,30"]
    done = CliRunner().invoke(main, [*arguments, *typed])
    assert done.exit_code == 0, done.output
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.abs(picture.astype(int) - expected[0]).max() <= ONE_GREY_LEVEL
    plain = paint(sdxl_folder, WAYS[0], latents=own, height=16, width=16, **SETTINGS)
    assert np.abs(plain - expected).max() > ONE_GREY_LEVEL  # the sizes count


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--crop", "3"], "got '3', expected two whole numbers with a comma between, as in 1024,768"),
        (["--crop=-1,0"], "-1 is not in the range 0<=x<=65536; expected at least 0"),
        (["--target-size", "16,65537"], "65537 is not in the range 1<=x<=65536; expected at most 65536"),
        (["--original-size", "1e3,16"], "'1e3' is not a valid integer"),
        (["--original-size", "16,16,16"], "expected two whole numbers"),
    ],
    ids=str,
)
def test_sizes_on_the_command_line_that_are_none(typed: list[str], words: str) -> None:
    done = CliRunner().invoke(main, ["generate", "bundle", "a cat", *typed])
    assert (done.exit_code, words in " ".join(done.output.split())) == (2, True), done.output


def test_sizes_on_the_command_line_for_another_model(float_bundle: Path, tmp_path: Path) -> None:
    arguments = ["generate", str(float_bundle), "a cat", "-o", str(tmp_path / "a.png"), "--crop", "0,0"]
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, "got crop, expected none: only a bundle of Stable Diffusion XL" in done.output) == (2, True)
    assert not (tmp_path / "a.png").exists()


def test_sizes_for_another_model(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="got crop, target_size, expected none: only a bundle of Stable Diffusion XL"):
        pipe("a cat", steps=1, crop=(0, 0), target_size=(16, 16))


def test_int8(xl: Pipeline, sdxl_int8_bundle: Path) -> None:
    manifest = read_bundle(sdxl_int8_bundle).manifest
    assert manifest.text_encoders == ("text_encoder", "text_encoder_2")
    assert all(info.integer_mac_share > 0.5 for info in manifest.components.values())
    assert set(manifest.components["text_encoder_2"].outputs) == {"hidden", "pooled"}
    expected = xl("a red house", steps=6).latents
    with qdeploy.load(sdxl_int8_bundle, low_memory=True) as pipe:
        assert pipe.model.zero_negative
        latents = pipe("a red house", steps=6).latents
    assert np.corrcoef(latents.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_int8_on_other_targets(sdxl_folder: Path, sdxl_table_file: Path, tmp_path: Path, target: str) -> None:
    """With the same gates; where the VAE asks for float32, a target in fp16 keeps it there around the integers."""
    export_bundle(load_model(str(sdxl_folder)), load_table(sdxl_table_file), load_target(target), tmp_path / "bundle")
    components = read_bundle(tmp_path / "bundle").manifest.components
    assert all(info.integer_mac_share > 0.5 for info in components.values())
    assert components["vae_decoder"].act_bits == 8
