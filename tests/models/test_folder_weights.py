"""A folder's weights: shards, precisions, and those that its modules have no place for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from qdeploy.base.errors import ModelError
from qdeploy.models.source import load_model
from tests.models.pictures import assert_diffusers_pictures, assert_same, edit_json, paint
from tests.tiny import UNET


@pytest.fixture
def folder(saved_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_folder, tmp_path / "model")


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


def save_in_shards(folder: Path, **options: Any) -> None:
    """Each part's weights in several files, as the libraries save large models."""
    from transformers import CLIPTextModel

    parts = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL, "text_encoder": CLIPTextModel}
    for part, cls in parts.items():
        module = cls.from_pretrained(folder / part)
        shutil.rmtree(folder / part)
        module.save_pretrained(folder / part, max_shard_size="60KB", **options)
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1


@pytest.fixture(scope="module")
def sharded_folder(saved_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved model with every part's weights in shards; only read."""
    folder = shutil.copytree(saved_folder, tmp_path_factory.mktemp("sharded") / "model")
    save_in_shards(folder)
    return folder


@pytest.fixture
def shards(sharded_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sharded_folder, tmp_path / "shards")


def test_weights_in_shards(sharded_folder: Path) -> None:
    assert_diffusers_pictures(sharded_folder)


def test_weights_in_shards_of_a_variant(folder: Path, tmp_path: Path) -> None:
    expected = load_model(str(folder))
    save_in_shards(folder, variant="fp16")
    model = load_model(str(folder))
    assert_same(paint(model), paint(expected))
    assert [text for text in model.corrections if "variant" in text] == [
        f"{part}: the weights' variant 'fp16' -> float32, since there is no {stem}.safetensors"
        for part, stem in (
            ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model"),
        )
    ]  # fmt: skip


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda files: dict.fromkeys(files, "../vae/x.safetensors"), r"got the file '\.\./vae/x\.safetensors'"),
        (lambda files: dict.fromkeys(files, "/x.safetensors"), "got the file '/x.safetensors'"),
        (lambda files: dict.fromkeys(files, "x.bin"), "got the file 'x.bin'"),
        (lambda files: dict.fromkeys(files, "x.safetensors"), "names 'x.safetensors', which is not there"),
        (lambda files: dict.fromkeys(files, 7), "`weight_map`: got {"),
        (lambda files: list(files), r"`weight_map`: got \["),
        (lambda files: None, "`weight_map`: got None"),
    ],
)
def test_an_index_of_shards_that_is_refused(shards: Path, part: str, change: Any, words: str) -> None:
    (file,) = (shards / part).glob("*.index.json")
    edit_json(file, lambda index: index.update(weight_map=change(index["weight_map"])))
    with pytest.raises(ModelError, match=rf"{part}/\S+\.index\.json.*{words}"):
        load_model(str(shards))


def test_a_shard_that_is_missing_or_cut(shards: Path) -> None:
    shard = sorted((shards / "unet").glob("*-of-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ModelError, match=rf"{shard.name} is cut or damaged"):
        load_model(str(shards))
    shard.unlink()
    with pytest.raises(ModelError, match=rf"names '{shard.name}', which is not there"):
        load_model(str(shards))


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


@pytest.mark.parametrize(
    ("part", "widths", "words"),
    [("unet", [64, 64], r"conv_in\.bias: \[32\], not \[64\]"), ("vae", [16, 16], r": \[8\], not \[16\]")],
)
def test_weights_of_other_shapes_are_named(folder: Path, part: str, widths: list[int], words: str) -> None:
    edit_json(folder / part / "config.json", lambda config: config.update(block_out_channels=widths))
    with pytest.raises(
        ModelError, match=rf"{part} have other shapes than its config\.json says \(.*{words}\); get the"
    ):
        load_model(str(folder))
