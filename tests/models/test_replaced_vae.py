"""`--vae`: another first stage in place of the model's own, full or TAESD's, in folders and the whole way."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import qdeploy
from qdeploy.base.errors import ModelError
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.cli import main
from qdeploy.export.exporter import export_bundle
from qdeploy.models.options import ModelOptions
from qdeploy.models.source import load_model
from qdeploy.targets.base import load_target
from tests.models.pictures import assert_same, first_latents, load_diffusers, paint, paint_diffusers
from tests.tiny import VAE

TINY = dict(encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 2),
            num_decoder_blocks=(2, 1))  # fmt: skip


@pytest.fixture(scope="module")
def taesd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taesd")
    torch.manual_seed(9)
    diffusers.AutoencoderTiny(**TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    torch.manual_seed(10)
    diffusers.AutoencoderKL(**VAE, scaling_factor=0.3).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["taesd", "full"])
def test_pictures_are_diffusers(tiny_folder: Path, name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    model = load_model(str(tiny_folder), ModelOptions(vae=folder))
    pipeline = load_diffusers(tiny_folder, diffusers.PNDMScheduler.from_pretrained(tiny_folder / "scheduler"))
    pipeline.vae = getattr(diffusers, model.vae_decoder.inner.config._class_name).from_pretrained(folder)  # type: ignore[union-attr]
    assert model.latents.scaling_factor == pipeline.vae.config.scaling_factor
    assert_same(paint(model), paint_diffusers(pipeline, first_latents(model)))
    assert any("--vae" in line for line in model.corrections)
    own = load_model(str(tiny_folder))
    assert len({own.sha256, model.sha256}) == 2


@pytest.mark.exports
def test_taesd_goes_the_whole_way(
    tiny_folder: Path, taesd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(tiny_folder), ModelOptions(vae=taesd))
    recorded = record_trajectories(model, ["a cat"], TimestepAwareSettings(samples=2, steps=4, record=4, batch=2))
    table = quantize_model(model, recorded, QuantSpec())
    decoder = table.components["vae_decoder"]
    last = f"decoder.layers.{len(model.vae_decoder.inner.decoder.layers) - 1}"  # type: ignore[union-attr, arg-type]
    assert set(decoder.float_layers) == {"decoder.layers.0", last}  # the first and the last stay in float
    assert {layer.reason for layer in decoder.float_layers.values()} == {"keep list"}
    export_bundle(model, table, load_target("ort-cpu"), tmp_path / "w8a8")
    export_bundle(model, None, load_target("ort-cpu"), tmp_path / "fp32", with_encoder=True)
    picture = np.random.default_rng(5).integers(0, 256, (16, 16, 3), np.uint8)
    noise = np.random.default_rng(3).standard_normal((1, 4, 8, 8), np.float32)
    home = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"
    monkeypatch.setattr(f"{home}.randn_tensor", lambda *_, **__: torch.from_numpy(noise))
    scheduler = diffusers.PNDMScheduler.from_pretrained(tiny_folder / "scheduler")
    pipeline = load_diffusers(tiny_folder, scheduler, "StableDiffusionImg2ImgPipeline")
    pipeline.vae = diffusers.AutoencoderTiny.from_pretrained(taesd)
    options = dict(strength=0.5, guidance_scale=5.0)
    expected = pipeline(
        "a cat", image=Image.fromarray(picture), num_inference_steps=6, output_type="np", **options
    ).images
    with qdeploy.load(tmp_path / "fp32") as pipe:
        actual = pipe("a cat", image=picture, steps=6, latents=noise, **options)
        assert_same(actual.pixels[0].astype(float), np.rint(expected[0] * 255))
        float_latents = pipe("a cat", steps=4).latents
    with qdeploy.load(tmp_path / "w8a8") as pipe:
        assert pipe.bundle.manifest.components["vae_decoder"].integer_mac_share > 0.5
        assert np.corrcoef(pipe("a cat", steps=4).latents.ravel(), float_latents.ravel())[0, 1] > 0.98


def test_on_the_command_line(tiny_folder: Path, taesd: Path, tmp_path: Path) -> None:
    arguments = ["calibrate", str(tiny_folder), "-o", str(tmp_path / "c.safetensors"), "--vae", str(taesd)]
    done = CliRunner().invoke(main, [*arguments, "--mode", "noise_data", "--samples", "1", "--steps", "2"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "c.safetensors").is_file()


def test_what_does_not_fit(tiny_folder: Path, full: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"--vae: .* holds no config\.json; give a folder with a VAE of its own"):
        load_model(str(tiny_folder), ModelOptions(vae=tmp_path))
    diffusers.AutoencoderKL(**VAE | {"latent_channels": 3}).save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match=r"latents of 3 channels at 1/2 of the size, the model's own of 4 at 1/2"):
        load_model(str(tiny_folder), ModelOptions(vae=tmp_path / "three"))
    with pytest.raises(ModelError, match="holds a 'UNet2DConditionModel', expected AutoencoderKL or AutoencoderTiny"):
        load_model(str(tiny_folder), ModelOptions(vae=tiny_folder / "unet"))
    empty = shutil.copytree(full, tmp_path / "empty")
    for path in empty.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ModelError, match="has no diffusion_pytorch_model"):
        load_model(str(tiny_folder), ModelOptions(vae=empty))
