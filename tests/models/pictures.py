"""Whole pictures of a loaded float model and of diffusers' pipelines, from the same latents."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.sampling import make_scheduler
from qdeploy.sampling.loop import PictureStreams, denoise, draw_unit_noise

ONE_GREY_LEVEL = 1  # float32 round-off of two implementations can straddle a rounding boundary
STEPS, GUIDANCE, PROMPT = 6, 4.0, "a red house"


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def first_latents(model: LatentDiffusion) -> NDArray[np.float32]:
    return draw_unit_noise(model.latents.shape, [(0, 0)])


@torch.no_grad()
def paint(model: LatentDiffusion, config: Mapping[str, Any] | None = None, prompt: str = PROMPT) -> NDArray[np.float64]:
    """The picture ``[H, W, 3]`` in grey levels, by the model's own modules and our scheduler."""
    scheduler = make_scheduler(
        model.scheduler_config if config is None else config, STEPS, rng=PictureStreams([(0, 0)])
    )
    cond = uncond = None
    if model.reads_text:
        (encoder,) = model.text_encoders.values()
        hidden = encoder(encoder.tokenizer([prompt, ""])).numpy()
        cond, uncond = hidden[:1], hidden[1:]

    def predict(x: NDArray[np.float32], t: int, context: NDArray[np.float32] | None) -> NDArray[np.float32]:
        text = () if context is None else (torch.from_numpy(context),)
        return model.unet(torch.from_numpy(x), torch.tensor(t), *text).numpy()

    final = denoise(predict, scheduler, first_latents(model), cond, uncond, GUIDANCE)
    image = model.vae_decoder(torch.from_numpy(final / np.float32(model.latents.scaling_factor)))[0]
    return np.rint((image.permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1) * 255.0)


def load_diffusers_parts(folder: Path) -> dict[str, Any]:
    """The model's modules in float32; its UNet rounds the timesteps that it is given."""
    from transformers import CLIPTextModel, CLIPTokenizer

    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    round_timesteps(unet)
    return dict(
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
    )


def round_timesteps(unet: Any) -> None:
    """Let ``unet`` round the timesteps that it is given, as a bundle's are whole.

    Euler's fall between two where they are spread evenly; docs/design/schedulers.md says what rounding them costs.
    """
    forward = unet.forward
    unet.forward = lambda sample, t, *rest, **named: forward(sample, t.round(), *rest, **named)


def open_diffusers(folder: Path, way: str = "StableDiffusionPipeline") -> Any:
    """diffusers' pipeline ``way`` as it opens the folder by itself, classes and configs read by its own rules."""
    pipeline = getattr(diffusers, way).from_pretrained(folder, torch_dtype=torch.float32)
    round_timesteps(pipeline.unet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_diffusers(way: str, parts: Mapping[str, Any], scheduler: Any) -> Any:
    """diffusers' pipeline ``way`` of these modules."""
    pipeline = getattr(diffusers, way)(
        **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_diffusers(folder: Path, scheduler: Any, way: str = "StableDiffusionPipeline") -> Any:
    """diffusers' pipeline ``way`` of the model in ``folder``."""
    return build_diffusers(way, load_diffusers_parts(folder), scheduler)


def load_diffusers_xl(folder: Path, way: str = "StableDiffusionXLPipeline") -> Any:
    """diffusers' pipeline ``way`` of the Stable Diffusion XL in ``folder``, which also rounds timesteps."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    pipeline = getattr(diffusers, way)(
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=diffusers.EulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        add_watermarker=False,
    )
    round_timesteps(pipeline.unet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint_diffusers(pipeline: Any, latents: NDArray[np.float32], prompt: str = PROMPT) -> NDArray[np.float64]:
    with same_draws(pipeline.scheduler):
        images = pipeline(
            prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=torch.from_numpy(latents),
            output_type="np",
        ).images  # fmt: skip
    return np.rint(images[0] * 255.0)


@contextmanager
def same_draws(scheduler: Any) -> Iterator[None]:
    """A stochastic scheduler draws the same noise as ours for picture 0 of seed 0."""
    streams = PictureStreams([(0, 0)])

    def draw(shape: Any, **_: Any) -> torch.Tensor:
        return torch.from_numpy(streams.standard_normal(tuple(shape)))

    with mock.patch.object(sys.modules[type(scheduler).__module__], "randn_tensor", draw, create=True):
        yield


def assert_same(actual: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    assert actual.shape == expected.shape
    assert np.isfinite(expected).all()
    assert expected.std() > 2  # else nothing is compared
    assert np.abs(actual - expected).max() <= ONE_GREY_LEVEL


def assert_diffusers_pictures(folder: Path) -> tuple[str, ...]:
    """Equal whole pictures of ours and of diffusers' own way to open ``folder``; returns our corrections."""
    model = load_model(str(folder))
    assert_same(paint(model), paint_diffusers(open_diffusers(folder), first_latents(model)))
    return model.corrections
