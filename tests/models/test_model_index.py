"""Folders that diffusers saved and opens by itself: each part's class is that of ``model_index.json``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qdeploy.base.errors import ModelError
from qdeploy.models.source import load_model
from qdeploy.sampling import CLASS_NAMES
from tests.models.pictures import (
    assert_same,
    edit_json,
    first_latents,
    load_diffusers,
    open_diffusers,
    paint,
    paint_diffusers,
)
from tests.tiny import SCHEDULER, UNET

BETAS = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
CONFIG = "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def saved_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as ``StableDiffusionPipeline.save_pretrained`` writes it; only read."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    load_diffusers(tiny_folder, diffusers.PNDMScheduler(**BETAS)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_folder, tmp_path / "model")


def assert_diffusers_pictures(folder: Path) -> tuple[str, ...]:
    """Equal whole pictures of ours and of diffusers' own way to open ``folder``; returns our corrections."""
    model = load_model(str(folder))
    assert_same(paint(model), paint_diffusers(open_diffusers(folder), first_latents(model)))
    return model.corrections


@pytest.mark.parametrize("name", CLASS_NAMES.values())
def test_a_pipeline_that_diffusers_saved(saved_folder: Path, tmp_path: Path, name: str) -> None:
    pipeline = load_diffusers(saved_folder, getattr(diffusers, name)(**BETAS))
    pipeline.save_pretrained(tmp_path / "model")
    assert_diffusers_pictures(tmp_path / "model")


@pytest.mark.parametrize("name", CLASS_NAMES.values())
def test_a_scheduler_swapped_in_diffusers_and_saved(saved_folder: Path, tmp_path: Path, name: str) -> None:
    pipeline = load_diffusers(saved_folder, diffusers.DDIMScheduler(**BETAS))
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "model")
    assert_diffusers_pictures(tmp_path / "model")


@pytest.mark.parametrize(
    ("file", "indexed"),
    [
        ("DDIMScheduler", "PNDMScheduler"),
        ("PNDMScheduler", "DDIMScheduler"),
        ("EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"),
        ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler"),
        ("HeunDiscreteScheduler", "UniPCMultistepScheduler"),
        ("DPMSolverMultistepScheduler", "PNDMScheduler"),
        ("LCMScheduler", "DDIMScheduler"),
        (None, "DDIMScheduler"),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["all settings", "few"])
def test_the_index_names_the_scheduler(folder: Path, file: str | None, indexed: str, whole: bool) -> None:
    """Only one of the two files was replaced; diffusers builds the index's class from the other file's settings."""
    source = "PNDMScheduler" if file is None else file
    getattr(diffusers, source)(**BETAS).save_pretrained(folder / "scheduler")
    config = json.loads((folder / CONFIG).read_text())
    config = {key: value for key, value in config.items() if whole or key in (*BETAS, "_class_name")}
    if file is None:
        config.pop("_class_name")
    (folder / CONFIG).write_text(json.dumps(config))
    edit_json(folder / "model_index.json", lambda index: index.update(scheduler=["diffusers", indexed]))
    corrections = assert_diffusers_pictures(folder)
    before = "missing" if file is None else repr(file)
    assert corrections[0].startswith(f"scheduler_config.json `_class_name`: {before} -> {indexed!r}, as diffusers")


def test_settings_marked_as_defaults_are_the_classs_own(folder: Path) -> None:
    config = BETAS | {
        "_class_name": "DDIMScheduler", "steps_offset": 1, "set_alpha_to_one": False, "timestep_spacing": "trailing",
        "_use_default_values": ["set_alpha_to_one", "timestep_spacing", "steps_offset"],
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config))
    edit_json(folder / "model_index.json", lambda index: index.update(scheduler=["diffusers", "DDIMScheduler"]))
    corrections = assert_diffusers_pictures(folder)
    assert corrections[0].startswith("scheduler_config.json `steps_offset`: 1 -> left out")
    assert "timestep_spacing" not in load_model(str(folder)).scheduler_config


def test_another_pipelines_parts_are_left_out_and_named(folder: Path) -> None:
    """diffusers ignores them with a warning."""
    edit_json(
        folder / "model_index.json",
        lambda index: index.update(controlnet=["diffusers", "ControlNetModel"], some_flag=True, nothing=[None, None]),
    )
    corrections = assert_diffusers_pictures(folder)
    assert corrections[-1] == (
        "model_index.json `controlnet`: left out, diffusers' StableDiffusionPipeline has no such part"
    )


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"scheduler": None}, r"`scheduler`: got None, expected a class.*\[\"diffusers\", \"PNDMScheduler\"\]"),
        ({"scheduler": [None, None]}, r"`scheduler`: got \[None, None\]"),
        ({"scheduler": "PNDMScheduler"}, "`scheduler`: got 'PNDMScheduler'"),
        ({"scheduler": ["diffusers"]}, r"`scheduler`: got \['diffusers'\]"),
        ({"scheduler": ["my_code", "PNDMScheduler"]}, r"`scheduler`: got \['my_code', .*own code is not run"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "`unet`: got the class 'UNet3DConditionModel'"),
        ({"unet": None}, "`unet`: got None"),
        ({"vae": ["diffusers", "AsymmetricAutoencoderKL"]}, "`vae`: got the class 'AsymmetricAutoencoderKL'"),
        (
            {"text_encoder": ["alt_diffusion", "RobertaSeriesModelWithTransformation"]},
            r"`text_encoder`: got \['alt_diffusion'",
        ),
        (
            {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]},
            "`text_encoder`: got the class 'CLIPTextModelWithProjection', expected CLIPTextModel;",
        ),
        ({"text_encoder": [None, None]}, r"`text_encoder`: got \[None, None\]"),
        ({"tokenizer": ["transformers", "BertTokenizer"]}, "`tokenizer`: got the class 'BertTokenizer'"),
        ({"tokenizer": {"a": 1}}, "`tokenizer`: got {'a': 1}"),
    ],
    ids=str,
)  # fmt: skip
def test_parts_that_are_refused_by_name(folder: Path, entry: dict[str, Any], words: str) -> None:
    edit_json(folder / "model_index.json", lambda index: index.update(entry))
    with pytest.raises(ModelError, match=rf"model_index\.json {words}"):
        load_model(str(folder))


def test_a_config_without_its_class(folder: Path) -> None:
    for part in ("unet", "vae"):
        edit_json(folder / part / "config.json", lambda config: config.pop("_class_name"))
    assert_diffusers_pictures(folder)
    edit_json(folder / "model_index.json", lambda index: index.pop("unet"))
    with pytest.raises(ModelError, match="unet holds a None, expected UNet2DConditionModel"):
        load_model(str(folder))


def test_a_first_stage_of_two_classes(unconditional_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(unconditional_folder, tmp_path / "model")
    edit_json(folder / "model_index.json", lambda index: index.update(vqvae=["diffusers", "AutoencoderKL"]))
    with pytest.raises(ModelError, match=r"vqvae holds a VQModel, .*model_index\.json says AutoencoderKL"):
        load_model(str(folder))


# ------------------------------------------------------------------------------------------------ weights without place


def add_weights(file: Path, **names: list[int]) -> None:
    tensors = load_file(file) | {name: torch.zeros(shape) for name, shape in names.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def drop(*names: str) -> Callable[[dict[str, Any]], object]:
    return lambda config: [config.pop(name) for name in names]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"time_cond_proj_dim": 16}, "time_embedding.cond_proj.weight"),
        ({"num_class_embeds": 3}, "class_embedding.weight"),
        ({"class_embed_type": "timestep"}, "class_embedding.linear_1.bias"),
        ({"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_proj.bias"),
    ],
    ids=lambda value: str(value),
)
def test_conditionings_whose_field_was_lost(folder: Path, settings: dict[str, Any], name: str) -> None:
    diffusers.UNet2DConditionModel(**UNET, **settings).save_pretrained(folder / "unet")
    edit_json(folder / "unet" / "config.json", drop(*settings))
    with pytest.raises(ModelError, match=rf"unet hold .*{name}.*no place"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "position_net.linears.0.weight"),
        ("unet/diffusion_pytorch_model.safetensors", "mid_block.attentions.0.to_k_ip.0.weight"),
        ("unet/diffusion_pytorch_model.safetensors", "conv_in.lora_A.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "quantize.embedding.weight"),
        ("text_encoder/model.safetensors", "encoder.blocks.9.mlp.fc1.weight"),
        ("text_encoder/model.safetensors", "encoder.layers.0.mlp.fc1.lora_A.weight"),
    ],
)
def test_weights_without_a_place_are_refused(folder: Path, file: str, name: str) -> None:
    add_weights(folder / file, **{name: [2, 2]})
    with pytest.raises(ModelError, match=rf"{Path(file).parent} hold {name}, which .* no place"):
        load_model(str(folder))


def test_what_text_encoders_are_saved_with(folder: Path) -> None:
    add_weights(
        folder / "text_encoder" / "model.safetensors",
        **{
            "embeddings.position_ids": [1, 16], "text_projection.weight": [32, 32], "logit_scale": [],
            "vision_model.post_layernorm.weight": [8], "visual_projection.weight": [32, 8],
        },
    )  # fmt: skip
    assert_diffusers_pictures(folder)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_codes_of_a_quantized_folder_are_no_weights(folder: Path, file: str) -> None:
    tensors = load_file(folder / file)
    name = sorted(name for name in tensors if name.endswith("weight"))[0]
    save_file(tensors | {name: tensors[name].mul(100).to(torch.int8)}, folder / file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{file} holds {name} \(I8\), expected real numbers"):
        load_model(str(folder))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_other_precision(folder: Path, dtype: torch.dtype) -> None:
    for file in folder.glob("*/*.safetensors"):
        save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    assert_diffusers_pictures(folder)


def test_clip_skip_by_the_config(folder: Path) -> None:
    """Later layers in the weights are left out, as the libraries do; those before the last one are needed."""
    edit_json(folder / "text_encoder" / "config.json", lambda config: config.update(num_hidden_layers=1))
    corrections = assert_diffusers_pictures(folder)
    assert corrections[-1] == "text_encoder/config.json `num_hidden_layers` 1: of the 2 layers that the weights have"
    add_weights(folder / "text_encoder" / "model.safetensors", **{"encoder.layers.0.mlp.fc1.lora_A.weight": [2, 2]})
    with pytest.raises(ModelError, match=r"text_encoder hold encoder\.layers\.0\.mlp\.fc1\.lora_A\.weight"):
        load_model(str(folder))


# ----------------------------------------------------------------------------------------------------- the text's width


def test_a_list_of_one_text_width(folder: Path) -> None:
    torch.manual_seed(5)
    diffusers.UNet2DConditionModel(**UNET | {"cross_attention_dim": (32, 32)}).save_pretrained(folder / "unet")
    assert_diffusers_pictures(folder)
    assert load_model(str(folder)).context_shape == (16, 32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cross_attention_dim": [32, 48]}, r"`cross_attention_dim`: got \[32, 48\]: the blocks read texts of several"),
        ({"cross_attention_dim": [[32], [32]]}, "`cross_attention_dim`"),
        ({"cross_attention_dim": []}, "`cross_attention_dim`"),
        ({"cross_attention_dim": "32"}, "`cross_attention_dim`"),
        ({"encoder_hid_dim": [32]}, r"`encoder_hid_dim`: got \[32\], expected a number"),
    ],
)
def test_text_widths_that_are_refused(folder: Path, settings: dict[str, Any], words: str) -> None:
    edit_json(folder / "unet" / "config.json", lambda config: config.update(settings))
    with pytest.raises(ModelError, match=rf"unet/config\.json {words}"):
        load_model(str(folder))


def test_a_unet_for_another_text_encoder(folder: Path) -> None:
    diffusers.UNet2DConditionModel(**UNET | {"cross_attention_dim": 48}).save_pretrained(folder / "unet")
    with pytest.raises(ModelError, match=r"reads texts of 48 channels .* is given 32 of the text_encoder"):
        load_model(str(folder))


def test_the_comparison_sees_another_scheduler(folder: Path) -> None:
    """The pictures of two classes differ by more than the comparison allows."""
    model = load_model(str(folder))
    other = open_diffusers(folder)
    other.scheduler = diffusers.EulerDiscreteScheduler.from_config(other.scheduler.config)
    difference = np.abs(paint(model) - paint_diffusers(other, first_latents(model)))
    assert difference.max() > 2
