"""The runtime's pictures are those of diffusers' pipelines: every scheduler, every way to start."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import qdeploy
from qdeploy.base.errors import UsageError
from qdeploy.export.exporter import export_bundle
from qdeploy.models.source import find_model_folder, load_model
from qdeploy.runtime.image import fit_image
from qdeploy.runtime.pipeline import Pipeline
from qdeploy.sampling import CLASS_NAMES, replace_scheduler
from qdeploy.targets.base import load_target
from tests.models.pictures import build_diffusers, load_diffusers_parts, same_draws
from tests.shared_artifacts import build_once

ONE_GREY_LEVEL = 1  # float32 round-off of two implementations can straddle a rounding boundary
HOME = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_"


def make_diffusers_scheduler(scheduler: str, config: dict[str, Any]) -> Any:
    """diffusers' scheduler called ``scheduler``."""
    made = replace_scheduler(config, scheduler)
    return getattr(diffusers, made["_class_name"]).from_config(made)


load_parts = functools.cache(load_diffusers_parts)  # these folders never change


def reference(way: str, folder: Path, scheduler: Any) -> Any:
    """diffusers' pipeline ``way`` of the model in ``folder``, whose modules are read once."""
    return build_diffusers(way, load_parts(folder), scheduler)


@pytest.fixture
def same_noise(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    return patch_starting_noise(pipe, monkeypatch)


def patch_starting_noise(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Unit noise that diffusers' pipelines also start from; they take the encoder's mean, as we do."""
    noise = np.random.default_rng(3).standard_normal((1, *pipe.latents.shape), np.float32)
    for module in ("img2img", "inpaint"):
        monkeypatch.setattr(f"{HOME}{module}.randn_tensor", lambda *_, **__: torch.from_numpy(noise))
        monkeypatch.setattr(f"{HOME}{module}.retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    return noise


def check_same(actual: qdeploy.Result, expected: np.ndarray) -> None:
    assert np.abs(actual.pixels[0].astype(int) - np.rint(expected[0] * 255)).max() <= ONE_GREY_LEVEL


@pytest.mark.parametrize("scheduler", CLASS_NAMES)
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_text_to_image(
    pipe: Pipeline, tiny_folder: Path, same_noise: np.ndarray, scheduler: str, guidance_scale: float
) -> None:
    expected_scheduler = make_diffusers_scheduler(scheduler, pipe.model.scheduler_config)
    diffusers_pipe = reference("StableDiffusionPipeline", tiny_folder, expected_scheduler)
    settings = dict(negative_prompt="blue", guidance_scale=guidance_scale, guidance_rescale=0.6)
    with same_draws(expected_scheduler):
        expected = diffusers_pipe(
            "a red house", num_inference_steps=8, latents=torch.from_numpy(same_noise), output_type="np", **settings
        ).images
    check_same(pipe("a red house", steps=8, latents=same_noise, scheduler=scheduler, **settings), expected)


@pytest.mark.parametrize("scheduler", CLASS_NAMES)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image(
    pipe: Pipeline, tiny_folder: Path, same_noise: np.ndarray, picture: np.ndarray, scheduler: str, strength: float
) -> None:
    expected_scheduler = make_diffusers_scheduler(scheduler, pipe.model.scheduler_config)
    diffusers_pipe = reference("StableDiffusionImg2ImgPipeline", tiny_folder, expected_scheduler)
    settings = dict(strength=strength, guidance_scale=5.0)
    with same_draws(expected_scheduler):
        expected = diffusers_pipe(
            "a red house", image=Image.fromarray(picture), num_inference_steps=8, output_type="np", **settings
        ).images
    actual = pipe("a red house", image=picture, steps=8, latents=same_noise, scheduler=scheduler, **settings)
    check_same(actual, expected)


@pytest.mark.parametrize("scheduler", CLASS_NAMES)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_by_blending(
    pipe: Pipeline, tiny_folder: Path, same_noise: np.ndarray, picture: np.ndarray, mask: np.ndarray, scheduler: str,
    strength: float,
) -> None:  # fmt: skip
    expected_scheduler = make_diffusers_scheduler(scheduler, pipe.model.scheduler_config)
    diffusers_pipe = reference("StableDiffusionInpaintPipeline", tiny_folder, expected_scheduler)
    with same_draws(expected_scheduler):
        expected = diffusers_pipe(
            "a red house", image=Image.fromarray(picture), mask_image=Image.fromarray(mask), num_inference_steps=8,
            height=16, width=16, strength=strength, guidance_scale=5.0, output_type="np",
        ).images  # fmt: skip
    actual = pipe(
        "a red house", image=picture, mask=mask, strength=strength, guidance_scale=5.0, steps=8, latents=same_noise,
        scheduler=scheduler,
    )  # fmt: skip
    check_same(actual, expected)


@build_once("inpainting", traces=True)
def inpainting_bundle(out: Path, inpainting_folder: Path) -> None:
    export_bundle(load_model(str(inpainting_folder)), None, load_target("ort-cpu"), out, with_encoder=True)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_by_the_unet(
    inpainting_folder: Path, inpainting_bundle: Path, same_noise: np.ndarray, picture: np.ndarray, mask: np.ndarray,
    guidance_scale: float, strength: float,
) -> None:  # fmt: skip
    with qdeploy.load(inpainting_bundle) as nine:
        diffusers_pipe = reference(
            "StableDiffusionInpaintPipeline",
            inpainting_folder,
            make_diffusers_scheduler("pndm", nine.model.scheduler_config),
        )
        expected = diffusers_pipe(
            "a red house", image=Image.fromarray(picture), mask_image=Image.fromarray(mask), num_inference_steps=6,
            height=16, width=16, strength=strength, guidance_scale=guidance_scale, output_type="np",
        ).images  # fmt: skip
        actual = nine(
            "a red house", image=picture, mask=mask, strength=strength, guidance_scale=guidance_scale, steps=6,
            latents=same_noise,
        )  # fmt: skip
        check_same(actual, expected)
        with pytest.raises(UsageError, match="give image and mask"):
            nine("a red house")
        with pytest.raises(UsageError, match="give a mask"):
            nine("a red house", image=picture)


@build_once("emoji", traces=True)
def emoji_bundle(out: Path) -> None:
    """Trained weights, in float."""
    export_bundle(load_model("builtin:emoji"), None, load_target("ort-cpu"), out, with_encoder=True)


@pytest.fixture(scope="module")
def emoji(emoji_bundle: Path) -> Iterator[Pipeline]:
    with qdeploy.load(emoji_bundle) as loaded:
        yield loaded


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", CLASS_NAMES)
@pytest.mark.parametrize("way", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"])
def test_the_built_in_model(emoji: Pipeline, monkeypatch: pytest.MonkeyPatch, scheduler: str, way: str) -> None:
    expected_scheduler = make_diffusers_scheduler(scheduler, emoji.scheduler_config)
    noise = patch_starting_noise(emoji, monkeypatch)
    start = Image.fromarray(emoji("a dog", steps=4, seed=1).pixels[0])
    theirs: dict[str, Any] = dict(latents=torch.from_numpy(noise))
    ours: dict[str, Any] = dict()
    if way == "StableDiffusionImg2ImgPipeline":
        theirs = ours = dict(image=start, strength=0.7)
    with same_draws(expected_scheduler):
        expected = reference(way, find_model_folder("builtin:emoji"), expected_scheduler)(
            "a cat", num_inference_steps=20, guidance_scale=5.0, output_type="np", **theirs
        ).images
    check_same(emoji("a cat", steps=20, guidance_scale=5.0, latents=noise, scheduler=scheduler, **ours), expected)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", CLASS_NAMES)
def test_inpainting_with_the_built_in_model(emoji: Pipeline, monkeypatch: pytest.MonkeyPatch, scheduler: str) -> None:
    expected_scheduler = make_diffusers_scheduler(scheduler, emoji.scheduler_config)
    noise = patch_starting_noise(emoji, monkeypatch)
    start = emoji("a dog", steps=4, seed=1).pixels[0]
    mask = np.zeros(start.shape[:2], np.uint8)
    mask[16:48, 24:] = 255
    diffusers_pipe = reference("StableDiffusionInpaintPipeline", find_model_folder("builtin:emoji"), expected_scheduler)
    channels = diffusers_pipe.unet.config.in_channels
    diffusers_pipe.unet.register_to_config(in_channels=4)  # what it calls a UNet that does not read the mask
    try:
        with same_draws(expected_scheduler):
            expected = diffusers_pipe(
                "a cat", image=Image.fromarray(start), mask_image=Image.fromarray(mask), num_inference_steps=20,
                height=64, width=64, strength=0.8, guidance_scale=5.0, output_type="np",
            ).images  # fmt: skip
    finally:
        diffusers_pipe.unet.register_to_config(in_channels=channels)
    actual = emoji(
        "a cat", image=start, mask=mask, strength=0.8, guidance_scale=5.0, steps=20, latents=noise, scheduler=scheduler
    )
    check_same(actual, expected)


def test_fitted_keeps_the_middle() -> None:
    wide = Image.new("RGB", (40, 20))
    wide.paste((255, 0, 0), (10, 0, 30, 20))
    assert np.array_equal(np.unique(np.asarray(fit_image(wide, 16, 16)).reshape(-1, 3), axis=0)[-1], [255, 0, 0])
    assert fit_image(wide, 16, 16).size == (16, 16)
