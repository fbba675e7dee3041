"""Folders that diffusers saved and opens by itself: each part's class is that of ``model_index.json``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from qdeploy.base.errors import ModelError
from qdeploy.models.source import load_model
from qdeploy.sampling import CLASS_NAMES
from tests.models.conftest import BETAS
from tests.models.pictures import (
    assert_diffusers_pictures,
    edit_json,
    first_latents,
    load_diffusers,
    open_diffusers,
    paint,
    paint_diffusers,
)
from tests.tiny import UNET

CONFIG = "scheduler/scheduler_config.json"


@pytest.fixture
def folder(saved_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_folder, tmp_path / "model")


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
