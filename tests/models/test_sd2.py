"""Stable Diffusion 2.x: folders and original files give diffusers' pictures, and its variants are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest

import qdeploy
from qdeploy.artifacts.bundle import open_bundle
from qdeploy.base.errors import ModelError
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.export.exporter import export_bundle
from qdeploy.models.options import ModelOptions
from qdeploy.models.source import load_model
from qdeploy.targets.base import load_target
from tests.models.original_files import original_state, write_ckpt, write_yaml
from tests.models.original_ldm import LatentDiffusion, tiny
from tests.models.pictures import assert_same, first_latents, load_diffusers, paint, paint_diffusers

PROMPTS = ["a cat! (red)", "a red house", ""]


def test_pictures_of_a_folder_are_diffusers(sd2_folder: Path) -> None:
    model = load_model(str(sd2_folder))
    scheduler = diffusers.DDIMScheduler.from_pretrained(sd2_folder / "scheduler")
    assert (scheduler.config.prediction_type, model.unet.inner.config.use_linear_projection) == ("v_prediction", True)
    pipeline = load_diffusers(sd2_folder, scheduler)
    assert_same(paint(model), paint_diffusers(pipeline, first_latents(model)))
    theirs = pipeline.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    ours = model.tokenize(PROMPTS)["text_encoder"]
    assert ours.tolist() == theirs.tolist()
    assert ours[2].tolist()[2:] == [pipeline.tokenizer.convert_tokens_to_ids("!")] * 14


@pytest.mark.exports
def test_the_whole_way(sd2_folder: Path, tmp_path: Path) -> None:
    model = load_model(str(sd2_folder))
    recorded = record_trajectories(model, PROMPTS, TimestepAwareSettings(samples=3, steps=4, record=4, batch=3))
    table = quantize_model(model, recorded, QuantSpec())
    export_bundle(model, table, load_target("ort-cpu"), tmp_path / "w8a8")  # with both gates
    export_bundle(model, None, load_target("ort-cpu"), tmp_path / "fp32")
    assert open_bundle(tmp_path / "w8a8").manifest.unet.integer_mac_share > 0.5
    pipeline = load_diffusers(sd2_folder, diffusers.DDIMScheduler.from_pretrained(sd2_folder / "scheduler"))
    expected = paint_diffusers(pipeline, first_latents(model))
    with qdeploy.load(tmp_path / "fp32") as pipe:
        ids = [tokenizer(PROMPTS) for tokenizer in pipe.model.tokenizers.values()]
        assert np.array_equal(ids[0], model.tokenize(PROMPTS)["text_encoder"].numpy())  # "!" pads there too
        assert_same(pipe("a red house", steps=6, guidance_scale=4.0).pixels[0].astype(float), expected)
        float_latents = pipe("a red house", steps=6).latents
    with qdeploy.load(tmp_path / "w8a8") as pipe:
        latents = pipe("a red house", steps=6).latents
        assert np.corrcoef(latents.ravel(), float_latents.ravel())[0, 1] > 0.99


def test_a_single_file_pads_as_open_clip(tiny_folder: Path, tmp_path: Path) -> None:
    source = LatentDiffusion(tiny("sd-v2-1"))
    path = write_ckpt(original_state(source), tmp_path / "v2.ckpt")
    options = ModelOptions(config=write_yaml(source.sizes, tmp_path / "v2-inference-v.yaml"))
    with pytest.raises(ModelError, match=r"tokenizer holds no tokenizer: put vocab.json and merges.txt .*of openai"):
        load_model(str(path), options)
    shutil.copytree(tiny_folder / "tokenizer", tmp_path / "tokenizer")  # pads with <|endoftext|> by itself
    model = load_model(str(path), options)
    backend = model.text_encoders["text_encoder"].tokenizer.backend
    assert backend.pad_token == "!"
    assert model.tokenize([""])["text_encoder"][0, -1] == backend.convert_tokens_to_ids("!")
    assert (model.latents.image_width, model.context_shape) == (768, (16, 128))


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("StableDiffusionDepth2ImgPipeline", "reads a depth map"),
        ("StableDiffusionUpscalePipeline", "the small picture that it enlarges"),
        ("StableUnCLIPImg2ImgPipeline", "a picture's embedding"),
        ("StableDiffusion3Pipeline", "is a transformer and no UNet"),
        ("FluxPipeline", "is a transformer and no UNet"),
    ],
)
def test_variants_are_refused_by_what_they_read(sd2_folder: Path, tmp_path: Path, pipeline: str, words: str) -> None:
    folder = shutil.copytree(sd2_folder, tmp_path / "model")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(ModelError, match=f"'{pipeline}': .*{words}, which is not supported; this version takes"):
        load_model(str(folder))
