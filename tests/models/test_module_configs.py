"""A folder's module configs: conditionings that are fed or refused by name, sizes, and files that are no files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from qdeploy.base.errors import ModelError
from qdeploy.models.source import load_model
from tests.models.pictures import assert_same, edit_json, first_latents, load_diffusers, paint, paint_diffusers
from tests.tiny import UNET

UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def rebuild_unet(folder: Path, **settings: Any) -> Path:
    torch.manual_seed(4)
    diffusers.UNet2DConditionModel(**UNET | settings).save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"time_cond_proj_dim": 2},
        {"class_embed_type": "timestep"},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8},
        {"num_class_embeds": 3},
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 2},
        {"encoder_hid_dim_type": "text_image_proj", "encoder_hid_dim": 32},
        {"dual_cross_attention": True},
        {"attention_type": "gated"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_conditionings_that_are_not_fed_are_refused_by_name(folder: Path, settings: dict[str, Any]) -> None:
    try:
        rebuild_unet(folder, **settings)
    except Exception:  # diffusers itself needs more of it; the config is enough here
        edit_json(folder / "unet" / "config.json", lambda config: config.update(settings))
    with pytest.raises(ModelError, match=rf"unet/config\.json `{next(iter(settings))}`: got "):
        load_model(str(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"only_cross_attention": True},
        {"only_cross_attention": (True, False), "mid_block_only_cross_attention": True},
        {"encoder_hid_dim": 32, "cross_attention_dim": 48},
        {"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj", "cross_attention_dim": 48},
        {"projection_class_embeddings_input_dim": 8},
        {"center_input_sample": True},
        {"timestep_post_act": "silu", "time_embedding_act_fn": "gelu"},
    ],
    ids=str,
)
def test_what_the_text_or_t_alone_feeds_makes_diffusers_pictures(folder: Path, settings: dict[str, Any]) -> None:
    rebuild_unet(folder, **settings)
    model = load_model(str(folder))
    scheduler = diffusers.PNDMScheduler.from_pretrained(folder / "scheduler")
    assert_same(paint(model), paint_diffusers(load_diffusers(folder, scheduler), first_latents(model)))
    assert model.make_example("unet", 1)["encoder_hidden_states"].shape == (1, 16, 32)


@pytest.mark.parametrize("size", [None, 0, -8, 7.5, True, "64", [8], [8, 8, 8], 10**12, [8, None]])
def test_a_sample_size_that_is_none(folder: Path, size: object) -> None:
    edit_json(folder / "unet" / "config.json", lambda config: config.update(sample_size=size))
    with pytest.raises(ModelError, match=r"unet/config\.json `sample_size`: got .*64 for Stable Diffusion 1"):
        load_model(str(folder))


def test_a_sample_size_that_is_missing_or_a_pair(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", lambda config: config.pop("sample_size"))
    with pytest.raises(ModelError, match="`sample_size`: got None"):
        load_model(str(folder))
    edit_json(folder / "unet" / "config.json", lambda config: config.update(sample_size=[8, 16]))
    latents = load_model(str(folder)).latents
    assert (latents.height, latents.image_width) == (8, 32)


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        ("vae", {"shift_factor": 0.1}, "`shift_factor`: got 0.1"),
        ("vae", {"latents_mean": [0.0] * 4}, "`latents_mean`"),
        ("vae", {"scaling_factor": 0}, "`scaling_factor`: got 0"),
        ("vae", {"scaling_factor": float("nan")}, "is not readable as JSON"),
        ("vae", {"scaling_factor": [1.0]}, "`scaling_factor`"),
        ("vae", {"layers_per_block": 10**9}, "`layers_per_block`"),
        ("vae", {"block_out_channels": [8] * 99}, "`block_out_channels`"),
        ("unet", {"block_out_channels": "all"}, "`block_out_channels`: got 'all'"),
        ("unet", {"down_block_types": []}, "`down_block_types`"),
        ("text_encoder", {"vocab_size": 10**12}, "`vocab_size`"),
        ("text_encoder", {"use_attention_mask": True}, "`use_attention_mask`"),
        ("text_encoder", {"text_config": {"vocab_size": 10**12}}, "`vocab_size`"),
        ("text_encoder", {"quantization_config": {"bits": 4}}, "`quantization_config`: got {'bits': 4}"),
        ("unet", {"quantization_config": {"load_in_8bit": True}}, "`quantization_config`"),
    ],
)
def test_settings_that_are_refused_by_name(folder: Path, file: str, settings: dict[str, Any], words: str) -> None:
    edit_json(folder / file / "config.json", lambda config: config.update(settings))
    with pytest.raises(ModelError, match=rf"{file}/config\.json {words}"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not readable as JSON"),
        (b"[" * 100_000, "nests 100000 deep, more than the 32"),
        (b'{"a": ' * 50 + b"1" + b"}" * 50, "nests 50 deep, more than the 32"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b"[]", "expected an object"),
        (b"null", "expected an object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer of more than 64 bits"),
        (b'{"a": NaN}', "is not readable as JSON"),
        (b" " * (2**20 + 1), "more than the 1,048,576 bytes"),
    ],
)
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_broken_json_names_its_file(folder: Path, name: str, content: bytes, words: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name}\W.*{words}"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", f"unet/{UNET_WEIGHTS}", "tokenizer/tokenizer.json"]
)
def test_devices_and_pipes_are_not_read(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=rf"{name} is a device, pipe or socket"):
        load_model(str(folder))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=rf"{name} is a device, pipe or socket"):
        load_model(str(folder))
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "nothing")
    with pytest.raises(ModelError, match=rf"{name} cannot be read|no model_index"):
        load_model(str(folder))


def test_links_of_a_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "1234"
    blob.parent.mkdir()
    shutil.move(folder / "unet" / UNET_WEIGHTS, blob)
    (folder / "unet" / UNET_WEIGHTS).symlink_to(blob)
    assert load_model(str(folder)).latents.height == 8


def test_variants_load(folder: Path, tiny_folder: Path) -> None:
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        weights = folder / part / f"{stem}.safetensors"
        halves = {name: tensor.half() for name, tensor in load_file(weights).items()}
        save_file(halves, weights.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        weights.unlink()
    model, whole = load_model(str(folder)), load_model(str(tiny_folder))
    for name in model.components:
        ours, theirs = model.component(name).state_dict(), whole.component(name).state_dict()
        assert all(
            torch.equal(ours[key], theirs[key].half().float()) for key in theirs if theirs[key].is_floating_point()
        )


def test_weights_that_are_not_there(folder: Path) -> None:
    weights = folder / "unet" / UNET_WEIGHTS
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    weights.rename(weights.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(ModelError, match="only in the variants fp16, non_ema"):
        load_model(str(folder))
    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"there is diffusion_pytorch_model\.bin, a pickle.*safe_serialization=True"):
        load_model(str(folder))
    (folder / "unet" / "diffusion_pytorch_model.bin").rename(folder / "unet" / "other.SAFETENSORS")
    with pytest.raises(ModelError, match=r"there is other\.SAFETENSORS; give it the name"):
        load_model(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("part", "file"), [("unet", UNET_WEIGHTS), ("vae", UNET_WEIGHTS), ("text_encoder", "model.safetensors")]
)
def test_a_weight_that_is_no_number_is_found_on_load(folder: Path, part: str, file: str, value: float) -> None:
    tensors = load_file(folder / part / file)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / part / file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weight `.*` holds NaN or infinity"):
        load_model(str(folder))


@pytest.mark.parametrize("settings", [{"max_position_embeddings": 8}, {"vocab_size": 700}, {"intermediate_size": 32}])
def test_a_text_encoders_config_of_other_sizes(folder: Path, settings: dict[str, int]) -> None:
    edit_json(folder / "text_encoder" / "config.json", lambda config: config.update(settings))
    with pytest.raises(ModelError, match=r"text_encoder have other shapes than its config\.json says"):
        load_model(str(folder))


@pytest.mark.parametrize("setting", ["padding_side", "truncation_side"])
def test_a_tokenizer_that_works_at_the_left(folder: Path, setting: str) -> None:
    edit_json(folder / "tokenizer" / "tokenizer_config.json", lambda config: config.update({setting: "left"}))
    with pytest.raises(ModelError, match=rf"tokenizer of the text_encoder has `{setting}` 'left'.*expected 'right'"):
        load_model(str(folder))


def test_a_token_without_a_row(folder: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<cat>", "<dog>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(ModelError, match=r"token '<cat>' has id 514 and the text encoder 514 rows, as have 1 more"):
        load_model(str(folder))
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    text.resize_token_embeddings(len(tokenizer))
    text.save_pretrained(folder / "text_encoder")
    assert load_model(str(folder)).tokenize(["a <cat>"])["text_encoder"].max() == 514
