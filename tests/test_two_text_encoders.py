"""A model with two text encoders goes the whole way by the same code: calibration, table, audit, bundle, runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import qdeploy
from qdeploy.artifacts.bundle import open_bundle
from qdeploy.base.errors import BundleError, ModelError, UsageError
from qdeploy.calibrate.dataset_file import load_calibration, save_calibration
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.export.exporter import export_bundle
from qdeploy.models.latent_diffusion import ModelParts, TextParts, assemble_model
from qdeploy.models.source import LatentDiffusion
from qdeploy.targets.base import load_target
from tests.tiny import TEXT

BOTH = ("text_encoder", "text_encoder_2")
PROMPTS = ["a cat", "a red house"]
BY_ENGINE = 1e-4  # float32 in another order


def make_parts(model: LatentDiffusion, positions: tuple[int, int] = (16, 16)) -> ModelParts:
    """The tiny model with two text encoders of half its text's width."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(4)
    first = model.text_encoders["text_encoder"]
    config = first.inner.config.to_dict() | {"hidden_size": TEXT["hidden_size"] // 2}
    encoders = [CLIPTextModel(CLIPTextConfig(**config | {"max_position_embeddings": length})) for length in positions]
    text = {name: TextParts(encoder, first.tokenizer.backend) for name, encoder in zip(BOTH, encoders, strict=True)}
    unet, vae = model.unet.inner, model.vae_decoder.inner
    scale = model.latents.scaling_factor
    return ModelParts(unet, vae, text, model.scheduler_config, scale, model.latents.height)


@pytest.fixture(scope="module")
def model(tiny_model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    folder = tmp_path_factory.mktemp("model")
    return assemble_model(make_parts(tiny_model), source="two encoders", folder=folder, sha256="2" * 64)


@pytest.fixture(scope="module")
def bundle(model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("way")
    settings = TimestepAwareSettings(samples=2, steps=3, record=3, batch=2)
    save_calibration(record_trajectories(model, PROMPTS, settings), folder / "c.safetensors")
    calibration = load_calibration(folder / "c.safetensors")
    assert tuple(calibration.input_ids) == BOTH
    table = quantize_model(model, calibration, QuantSpec(gptq=False))
    assert tuple(table.components) == tuple(table.probes) == (*BOTH, "unet", "vae_decoder")
    export_bundle(model, table, load_target("ort-cpu"), folder / "w8a8")  # audits every one of them
    export_bundle(model, None, load_target("ort-cpu"), folder / "fp32")
    return folder


def test_the_embeddings_are_joined_in_order(model: LatentDiffusion) -> None:
    ids = model.tokenize(PROMPTS)
    with torch.no_grad():
        first, second = (model.component(name)(ids[name]) for name in BOTH)
    assert torch.equal(model.embed(ids), torch.cat([first, second], dim=-1))
    assert not torch.allclose(first, second, atol=0.1)
    assert model.components == (*BOTH, "unet", "vae_decoder")


@pytest.mark.exports
def test_the_whole_way(model: LatentDiffusion, bundle: Path) -> None:
    manifest = open_bundle(bundle / "w8a8").manifest
    assert manifest.text_encoders == BOTH
    assert all(manifest.components[name].integer_mac_share > 0.5 for name in BOTH)
    with qdeploy.load(bundle / "fp32") as pipe:
        expected = model.embed(model.tokenize(PROMPTS)).numpy()
        np.testing.assert_allclose(pipe.encode(PROMPTS), expected, rtol=BY_ENGINE, atol=BY_ENGINE)
        tokens = [tokenizer(PROMPTS) for tokenizer in pipe.model.tokenizers.values()]
        assert np.array_equal(pipe.embed(*tokens), pipe.encode(PROMPTS))
        with pytest.raises(UsageError, match="got 1 arrays, expected 2, one for each of text_encoder, text_encoder_2"):
            pipe.embed(tokens[0])
        float_picture = pipe("a cat", steps=2)
        plain, weighted = (pipe(text, steps=2, weighting=True) for text in ("(a:1) cat", "(a:1.5) cat"))
        assert np.array_equal(plain.pixels, float_picture.pixels)
        assert not np.array_equal(weighted.latents, plain.latents)
    with qdeploy.load(bundle / "w8a8", low_memory=True) as pipe:
        result = pipe("a cat", steps=2)
        assert set(BOTH) < set(result.timings_ms)
        assert np.corrcoef(result.latents.ravel(), float_picture.latents.ravel())[0, 1] > 0.99


@pytest.mark.exports
def test_each_needs_its_tokenizer(bundle: Path) -> None:
    assert (bundle / "fp32" / "tokenizer_2" / "tokenizer.json").is_file()
    (bundle / "fp32" / "tokenizer_2" / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer_2/tokenizer\.json is missing"):
        open_bundle(bundle / "fp32")


def test_encoders_of_different_lengths_are_refused(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected one length for all"):
        assemble_model(make_parts(tiny_model, (16, 8)), source="odd", folder=tmp_path, sha256="2" * 64)
