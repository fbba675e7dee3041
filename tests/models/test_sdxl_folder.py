"""Folders of Stable Diffusion XL: how they are read and calibrated, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.base.errors import CalibrationError, ExportError, ModelError, UsageError
from qdeploy.calibrate.dataset import check_shapes
from qdeploy.calibrate.dataset_file import load_calibration, save_calibration
from qdeploy.calibrate.record.conditioning import encode_prompts
from qdeploy.calibrate.record.modes import CalibrationRequest, calibrate_to_file
from qdeploy.export.exporter import export_bundle
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.targets.base import load_target
from tests.models.pictures import edit_json

PROMPTS = ["a cat!", "", "a red house"]


@pytest.fixture(scope="module")
def model(sdxl_folder: Path) -> LatentDiffusion:
    return load_model(str(sdxl_folder))


@pytest.fixture
def folder(sdxl_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sdxl_folder, tmp_path / "model")


@torch.no_grad()
def test_hidden_states_and_pooled_text_are_transformers(model: LatentDiffusion) -> None:
    """The last layer but one without the final norm, of both; the second one's projection of the last layer's end."""
    ids = model.tokenize(PROMPTS)
    assert not torch.equal(ids["text_encoder"], ids["text_encoder_2"])  # each pads with its own token
    theirs = [
        model.component(name).inner(ids[name], output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")
    ]
    ours = model.embed_all(ids)
    torch.testing.assert_close(ours["text_embeds"], theirs[1].text_embeds)
    torch.testing.assert_close(
        ours["encoder_hidden_states"], torch.cat([each.hidden_states[-2] for each in theirs], dim=-1)
    )
    assert (model.context_shape, model.pooled_width, model.zero_negative) == ((16, 80), 24, True)
    assert (model.latents.scaling_factor, model.vae_decoder.stays_float32) == (0.13025, True)


@torch.no_grad()
def test_the_end_of_the_text_by_the_largest_id(model: LatentDiffusion) -> None:
    """Configs of 2023 say `eos_token_id` 2, which transformers reads as the largest id."""
    encoder: Any = model.component("text_encoder_2").inner
    ids = torch.tensor([[0, 5, 9, 1, 3, 3], [0, 5, 400, 9, 1, 3]])
    kept = encoder.text_model.eos_token_id
    try:
        encoder.text_model.eos_token_id = 2
        expected = encoder(ids).text_embeds
        torch.testing.assert_close(model.component("text_encoder_2")(ids)[1], expected)
    finally:
        encoder.text_model.eos_token_id = kept
    assert not torch.allclose(model.component("text_encoder_2")(ids)[1], expected)


def test_a_recording_holds_pooled_text_and_sizes(model: LatentDiffusion, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na red house\n")
    request = CalibrationRequest(samples=2, steps=3, record=3, batch=2, prompts=prompts)
    calibrate_to_file(model, request, tmp_path / "c.safetensors")
    recording = load_calibration(tmp_path / "c.safetensors")
    assert recording.pooled is not None
    assert recording.sizes is not None
    assert (recording.pooled.shape, recording.sizes.shape) == ((3, 24), (6, 6))
    assert recording.sizes[0].tolist() == [16, 16, 0, 0, 16, 16]
    assert not recording.pooled[0].any()  # as the runtime embeds an empty negative prompt
    assert not recording.contexts[0].any()  # type: ignore[index]
    batch = next(iter(recording.batches("unet", 4)))
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "sample": (4, 4, 8, 8), "timestep": (), "encoder_hidden_states": (4, 16, 80), "text_embeds": (4, 24),
        "time_ids": (4, 6),
    }  # fmt: skip
    half = len(batch["text_embeds"]) // 2
    assert torch.equal(batch["text_embeds"][half:], recording.pooled[recording.prompt[:2]].float())  # type: ignore[index]


def test_an_empty_prompt_is_encoded_and_only_the_negative_one_is_zeros(model: LatentDiffusion) -> None:
    conditioning = encode_prompts(model, ["", "a cat"], 2)
    assert conditioning is not None
    assert conditioning.rows.tolist() == [1, 2]
    assert not conditioning.contexts[0].any()
    torch.testing.assert_close(conditioning.contexts[1:2], model.embed(model.tokenize([""])))


def test_sets_of_other_models_are_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    request = CalibrationRequest(mode="noise_data", samples=2, steps=3)
    recording = calibrate_to_file(model, request, tmp_path / "c.safetensors")
    without = dataclasses.replace(recording, pooled=None, sizes=None)
    with pytest.raises(CalibrationError, match="holds a pooled text of no channels, the model reads 24"):
        check_shapes(without, model.latents.shape, model.context_shape, model.pooled_width)
    for broken, words in (
        (dataclasses.replace(recording, sizes=None), "go together"),
        (dataclasses.replace(recording, pooled=recording.pooled[:1]), "`pooled` has 1 rows"),  # type: ignore[index]
        (dataclasses.replace(recording, sizes=recording.sizes[:, :5]), "6 numbers"),  # type: ignore[index]
    ):
        save_calibration(broken, tmp_path / "broken.safetensors")
        with pytest.raises(CalibrationError, match=words):
            load_calibration(tmp_path / "broken.safetensors")
    with pytest.raises(UsageError, match="Q-Diffusion's layout cannot hold"):
        calibrate_to_file(model, request, tmp_path / "c.pt")


@pytest.mark.exports
def test_the_vae_stays_in_float32_on_a_target_in_fp16(model: LatentDiffusion, tmp_path: Path) -> None:
    export_bundle(model, None, load_target("ort-cuda"), tmp_path / "bundle", with_encoder=True)
    components = open_bundle(tmp_path / "bundle").manifest.components
    bits = {name: info.weight_bits for name, info in components.items()}
    assert bits == {
        "text_encoder": (16,), "text_encoder_2": (16,), "unet": (16,), "vae_decoder": (32,), "vae_encoder": (32,),
    }  # fmt: skip


@pytest.mark.exports
def test_a_vae_that_does_not_ask_for_float32(folder: Path, tmp_path: Path) -> None:
    edit_json(folder / "vae" / "config.json", lambda config: config.update(force_upcast=False))
    loaded = load_model(str(folder))
    assert not loaded.vae_decoder.stays_float32
    loaded.vae_decoder.inner.decoder.conv_in.weight.data *= 1e7  # type: ignore[union-attr]
    with pytest.raises(ExportError, match="vae_decoder: values beyond fp16"):
        export_bundle(loaded, None, load_target("ort-cuda"), tmp_path / "bundle")


@pytest.mark.parametrize("index", [{"requires_aesthetics_score": True}, {"text_encoder": [None, None]}], ids=str)
def test_the_refiner(folder: Path, index: dict[str, Any]) -> None:
    edit_json(folder / "model_index.json", lambda document: document.update(index))
    with pytest.raises(ModelError, match="is the refiner of Stable Diffusion XL, which is not supported"):
        load_model(str(folder))


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_a_missing_second_part(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(ModelError, match=f"is incomplete: no folder {part}"):
        load_model(str(folder))


def test_an_empty_second_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer_2")
    (folder / "tokenizer_2").mkdir()
    with pytest.raises(ModelError, match=r"tokenizer_2 holds no tokenizer: put vocab.json and merges.txt"):
        load_model(str(folder))


def test_an_xl_unet_in_another_pipeline(folder: Path, tiny_folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(tiny_folder / "text_encoder", folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    settings = json.loads((folder / "unet" / "config.json").read_text()) | {"cross_attention_dim": 32}
    diffusers.UNet2DConditionModel.from_config(settings).save_pretrained(folder / "unet")
    with pytest.raises(ModelError, match="pooled text embedding of 24 channels next to 6 sizes, and no text encoder"):
        load_model(str(folder))


def test_a_pooled_text_of_another_width(folder: Path) -> None:
    """As a refiner's UNet has it: five sizes in place of six."""
    settings = json.loads((folder / "unet" / "config.json").read_text())
    settings["projection_class_embeddings_input_dim"] = 24 + 5 * 8
    diffusers.UNet2DConditionModel.from_config(settings).save_pretrained(folder / "unet")
    with pytest.raises(ModelError, match=r"pooled text embedding of 16 channels .*text_encoder_2 gives 24.*refiner"):
        load_model(str(folder))
    edit_json(folder / "unet" / "config.json", lambda config: config.update(projection_class_embeddings_input_dim=8))
    with pytest.raises(ModelError, match="`projection_class_embeddings_input_dim`: got 8 with"):
        load_model(str(folder))


def test_sizes_are_no_part_of_other_unets(tiny_model: LatentDiffusion) -> None:
    assert tiny_model.pooled_width is None
    assert set(tiny_model.make_example("unet", 1)) == {"sample", "timestep", "encoder_hidden_states"}
