"""CompVis' text-to-image latent diffusion the whole way: BERT text encoder, word pieces, KL first stage."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import qdeploy
from qdeploy.base.errors import ModelError
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.export.audit import audit_graph
from qdeploy.export.exporter import export_bundle
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.passes.name_by_layer import PRODUCTS
from qdeploy.targets.base import load_target
from tests.shared_artifacts import build_once
from tests.test_imports import run_blocked

TARGET = load_target("ort-cpu")
PROMPTS = ["", "a red cat", "House, été! 7", "red " * 100]


@pytest.fixture(scope="module")
def model(ldm_text_folder: Path) -> LatentDiffusion:
    return load_model(str(ldm_text_folder))


@build_once("fp32", traces=True)
def ldm_text_bundle(out: Path, ldm_text_folder: Path) -> None:
    export_bundle(load_model(str(ldm_text_folder)), None, TARGET, out)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_same_picture_as_diffusers_within_one_grey_level(
    ldm_text_bundle: Path, ldm_text_folder: Path, guidance_scale: float
) -> None:
    from diffusers import LDMTextToImagePipeline

    reference = LDMTextToImagePipeline.from_pretrained(ldm_text_folder)
    reference.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(3))
    expected = reference(
        ["a red cat"], num_inference_steps=6, guidance_scale=guidance_scale, latents=latents, output_type="np",
        height=64, width=64,  # the pipeline takes every first stage for one of factor 8
    ).images  # fmt: skip
    with qdeploy.load(ldm_text_bundle) as pipe:
        actual = pipe("a red cat", steps=6, guidance_scale=guidance_scale, latents=latents.numpy())
    assert np.abs(actual.pixels.astype(int) - np.rint(expected * 255)).max() <= 1


def test_tokens_equal_transformers(ldm_text_bundle: Path, ldm_text_folder: Path) -> None:
    from transformers import BertTokenizer

    reference = BertTokenizer.from_pretrained(ldm_text_folder / "tokenizer")
    expected = reference(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="np").input_ids
    with qdeploy.load(ldm_text_bundle) as pipe:
        assert np.array_equal(pipe.model.tokenizers["text_encoder"](PROMPTS), expected)


@pytest.mark.exports
def test_w8a8_the_whole_way_and_generate_without_torch(model: LatentDiffusion, tmp_path: Path) -> None:
    calibration = record_trajectories(model, PROMPTS[:3], TimestepAwareSettings(samples=3, steps=5, record=5, batch=3))
    table = quantize_model(model, calibration, QuantSpec())
    assert not any("to_logits" in layer for layer in table.components["text_encoder"].layers)
    export_bundle(model, table, TARGET, tmp_path / "w8a8")
    audit = audit_graph(tmp_path / "w8a8" / "text_encoder" / "model.onnx", TARGET.engine)
    assert all(finding.integer for finding in audit.findings if not finding.layer.endswith(PRODUCTS))
    command = "from qdeploy.cli import main\nmain(sys.argv[1:])"
    out = tmp_path / "cat.png"
    run_blocked(command, "--quiet", "generate", str(tmp_path / "w8a8"), "a cat", "-o", str(out), "--steps", "2")
    assert out.stat().st_size > 0


def test_a_missing_vocabulary_says_which_file_to_put_where(ldm_text_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(ldm_text_folder, tmp_path / "model")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer holds no tokenizer: put vocab\.txt .*bert-base-uncased there"):
        load_model(str(folder))


def test_only_a_vocabulary_file_is_enough(ldm_text_folder: Path, tmp_path: Path, model: LatentDiffusion) -> None:
    folder = shutil.copytree(ldm_text_folder, tmp_path / "model")
    words = sorted(model.text_encoders["text_encoder"].tokenizer.backend.get_vocab().items(), key=lambda item: item[1])
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(word for word, _ in words))
    loaded = load_model(str(folder))
    assert loaded.latents.tokens == 77
    assert torch.equal(loaded.tokenize(PROMPTS)["text_encoder"], model.tokenize(PROMPTS)["text_encoder"])
