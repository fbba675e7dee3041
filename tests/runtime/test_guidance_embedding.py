"""UNets that read the guidance scale (latent consistency models): pictures are diffusers', and guidance is off."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import qdeploy
from qdeploy.base.errors import CalibrationError, UsageError
from qdeploy.calibrate.dataset_file import load_calibration
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.record.modes import CalibrationRequest, calibrate_to_file
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.engines.base import EngineOptions, load_engine
from qdeploy.export.exporter import export_bundle, export_component
from qdeploy.export.open_dims import OpenDims
from qdeploy.models.source import load_model
from qdeploy.sampling.guidance_embedding import embed_guidance_scale
from qdeploy.targets.base import load_target
from tests.models.pictures import ONE_GREY_LEVEL, edit_json, load_diffusers, same_draws
from tests.tiny import SCHEDULER, UNET

BETAS = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
ROUND_OFF = 1e-3  # of float32 angles of some thousand radians
LEAST_FP16_DB = 40.0  # half precision gives 50 and more here; a scale that is not read, below 10


@pytest.mark.parametrize("channels", [4, 9, 16, 256])
@pytest.mark.parametrize("guidance_scale", [1.0, 1.5, 7.5, 8.5, 14.0, -2.0])
def test_the_embedding_is_diffusers(channels: int, guidance_scale: float) -> None:
    pipeline = diffusers.StableDiffusionPipeline
    scale = torch.tensor(guidance_scale - 1).repeat(2)
    expected = pipeline.get_guidance_scale_embedding(None, scale, embedding_dim=channels).numpy()
    ours = embed_guidance_scale(guidance_scale, channels, 2)
    assert (ours.shape, ours.dtype) == (expected.shape, np.float32)
    assert np.abs(ours - expected).max() < ROUND_OFF


def write_lcm(tiny_folder: Path, folder: Path, channels: int, **settings: int) -> Path:
    shutil.copytree(tiny_folder, folder)
    torch.manual_seed(6)
    unet = diffusers.UNet2DConditionModel(**UNET | settings, time_cond_proj_dim=channels)
    unet.time_embedding.cond_proj.weight.data.normal_()  # else the scale would hardly matter
    unet.save_pretrained(folder / "unet")
    config = BETAS | {"_class_name": "LCMScheduler", "clip_sample": False}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.exports
@pytest.mark.parametrize(
    ("channels", "open_dims", "pipeline"),
    [
        (16, OpenDims(), "StableDiffusionPipeline"),
        (9, OpenDims(batch=True), "StableDiffusionPipeline"),
        (16, OpenDims(), "LatentConsistencyModelPipeline"),
    ],
)
def test_pictures_are_diffusers(
    tiny_folder: Path, tmp_path: Path, channels: int, open_dims: OpenDims, pipeline: str
) -> None:
    folder = write_lcm(tiny_folder, tmp_path / "lcm", channels)
    edit_json(folder / "model_index.json", lambda index: index.update(_class_name=pipeline))
    model = load_model(str(folder))
    manifest = export_bundle(model, None, load_target("ort-cpu"), tmp_path / "bundle", open_dims=open_dims)
    batch = -1 if open_dims.batch else 1
    assert manifest.components["unet"].inputs["timestep_cond"].shape == (batch, channels)
    reference = load_diffusers(folder, diffusers.LCMScheduler.from_pretrained(folder / "scheduler"), pipeline)
    # the pipeline of latent consistency models reads no negative prompt, and without guidance none has an effect
    negative = {} if pipeline.startswith("Latent") else {"negative_prompt": "blue"}
    assert reference.unet.config.time_cond_proj_dim == channels
    noise = np.random.default_rng(3).standard_normal((1, 4, 8, 8), np.float32)
    pictures = {}
    with qdeploy.load(tmp_path / "bundle") as pipe:
        for guidance_scale in (1.5, 8.0):
            with same_draws(reference.scheduler):
                expected = reference(
                    "a red house", num_inference_steps=4, guidance_scale=guidance_scale, output_type="np",
                    latents=torch.from_numpy(noise), **negative,
                ).images  # fmt: skip
            actual = pipe("a red house", negative_prompt="blue", steps=4, guidance_scale=guidance_scale, latents=noise)
            pictures[guidance_scale] = actual.pixels[0].astype(int)
            assert expected.std() * 255 > 2
            assert np.abs(pictures[guidance_scale] - np.rint(expected[0] * 255)).max() <= ONE_GREY_LEVEL
        both = pipe(["a red house", "a cat"], steps=2, guidance_scale=8.0)
        assert both.pixels.shape == (2, 16, 16, 3)
    assert np.abs(pictures[1.5] - pictures[8.0]).max() > ONE_GREY_LEVEL


@pytest.mark.exports
def test_inpainting_with_a_unet_of_both_kinds(
    inpainting_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A UNet that reads the guidance scale, a mask and the masked picture."""
    folder = write_lcm(inpainting_folder, tmp_path / "lcm", 16, in_channels=9)
    export_bundle(load_model(str(folder)), None, load_target("ort-cpu"), tmp_path / "bundle", with_encoder=True)
    generator = np.random.default_rng(5)
    noise = generator.standard_normal((1, 4, 8, 8), np.float32)
    picture = generator.integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 6:] = 255
    home = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint"
    monkeypatch.setattr(f"{home}.randn_tensor", lambda *_, **__: torch.from_numpy(noise))
    monkeypatch.setattr(f"{home}.retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    scheduler = diffusers.LCMScheduler.from_pretrained(folder / "scheduler")
    reference = load_diffusers(folder, scheduler, "StableDiffusionInpaintPipeline")
    pictures = []
    with qdeploy.load(tmp_path / "bundle") as pipe:
        for guidance_scale in (1.5, 8.0):
            with same_draws(scheduler):
                expected = reference(
                    "a red house", image=Image.fromarray(picture), mask_image=Image.fromarray(mask), height=16,
                    width=16, num_inference_steps=4, guidance_scale=guidance_scale, strength=1.0, output_type="np",
                ).images[0]  # fmt: skip
            actual = pipe(
                "a red house", image=picture, mask=mask, steps=4, guidance_scale=guidance_scale, strength=1.0,
                latents=noise,
            ).pixels[0].astype(int)  # fmt: skip
            assert np.abs(actual - np.rint(expected * 255)).max() <= ONE_GREY_LEVEL
            pictures.append(actual)
    assert np.abs(pictures[0] - pictures[1]).max() > ONE_GREY_LEVEL


@pytest.mark.exports
@pytest.mark.parametrize("target", ["tensorrt", "ort-cuda"])
def test_fp16_graphs_take_the_embedding_in_float32(tiny_folder: Path, tmp_path: Path, target: str) -> None:
    """The runtime feeds float32; half precision would round its sines of angles up to thousands only after them."""
    model = load_model(str(write_lcm(tiny_folder, tmp_path / "lcm", 16)))
    info = export_component(model, "unet", None, [], load_target(target), tmp_path / "unet")
    assert {name: tensor.dtype for name, tensor in info.inputs.items()} == {
        "sample": "float32", "timestep": "int64", "encoder_hidden_states": "float32", "timestep_cond": "float32",
    }  # fmt: skip
    assert info.engine_sqnr_db is not None
    assert info.engine_sqnr_db > LEAST_FP16_DB  # of the gate's run, with the embedding among its inputs
    session = load_engine("ort-cpu").open_session(tmp_path / "unet" / "model.onnx", EngineOptions())
    example = {name: value.numpy() for name, value in model.make_example("unet", 1).items()}
    try:
        for guidance_scale in (1.5, 8.0):
            feeds = example | {"timestep_cond": embed_guidance_scale(guidance_scale, 16, 1)}
            actual = session.run(feeds)["noise_pred"]
            expected = model.unet(**{name: torch.from_numpy(np.asarray(value)) for name, value in feeds.items()})
            error = actual - expected.numpy()
            assert 10 * np.log10(np.square(expected.numpy()).sum() / np.square(error).sum()) > LEAST_FP16_DB
    finally:
        session.close()


def test_only_trajectories_record_the_scale(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_model(str(write_lcm(tiny_folder, tmp_path / "lcm", 16)))
    with pytest.raises(UsageError, match=r"`time_cond_proj_dim`.*only --mode timestep_aware"):
        calibrate_to_file(model, CalibrationRequest(mode="noise_data", samples=1, steps=1), tmp_path / "c.safetensors")


@pytest.mark.exports
def test_int8(tiny_folder: Path, tmp_path: Path) -> None:
    """Calibration runs the model's own schedule of few steps, once a step, with the embedded scale."""
    model = load_model(str(write_lcm(tiny_folder, tmp_path / "lcm", 16)))
    request = CalibrationRequest(samples=3, steps=4, record=4, guidance=8.0)
    recording = calibrate_to_file(model, request, tmp_path / "c.safetensors")
    loaded = load_calibration(tmp_path / "c.safetensors")
    assert (loaded.is_guided, loaded.halves, loaded.count("unet")) == (False, 1, 12)
    assert sorted(set(loaded.timestep.tolist())) == [259, 499, 759, 999]  # latent consistency models' own four
    assert loaded.guidance is not None
    expected = torch.from_numpy(embed_guidance_scale(8.0, 16, 12)).half()
    assert torch.equal(loaded.guidance, expected)
    table = quantize_model(model, loaded, QuantSpec())
    export_bundle(model, table, load_target("ort-cpu"), tmp_path / "w8a8")
    export_bundle(model, None, load_target("ort-cpu"), tmp_path / "fp32")
    options = dict(steps=4, guidance_scale=8.0)
    with qdeploy.load(tmp_path / "fp32") as pipe:
        float_latents = pipe("a red house", **options).latents
    with qdeploy.load(tmp_path / "w8a8") as pipe:
        latents = pipe("a red house", **options).latents
    assert np.corrcoef(latents.ravel(), float_latents.ravel())[0, 1] > 0.98
    broken = dataclasses.replace(recording, guidance=None)
    with pytest.raises(CalibrationError, match="a guidance scale of no channels, the model reads 16"):
        quantize_model(model, broken, QuantSpec())
