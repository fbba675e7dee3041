"""Original files whose layers have other names, two names, or hold a quantized model's codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qdeploy.base.errors import ModelError
from qdeploy.inspection.describe import describe
from qdeploy.models.checkpoints import convert_checkpoint, describe_checkpoint
from tests.models.original_files import original_state, write_ckpt
from tests.models.original_ldm import LatentDiffusion


def test_codes_of_a_quantized_file_are_no_weights(source: LatentDiffusion, file: Path) -> None:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    write_ckpt(original_state(source) | {name: original_state(source)[name].mul(100).to(torch.int8)}, file)
    for use in (convert_checkpoint, describe_checkpoint):
        with pytest.raises(
            ModelError, match=r"1 weights of the UNet are no real numbers: conv_in\.weight \(torch\.int8"
        ):
            use(file)


def test_two_namings_of_one_layer(source: LatentDiffusion, file: Path) -> None:
    """A merge, key by key, of a file with the original's names and one with diffusers'."""
    # the modules are mapped from the file, which is written anew below
    expected = {key: value.clone() for key, value in convert_checkpoint(file).vae.state_dict().items()}
    state = original_state(source)
    name = "first_stage_model.decoder.mid.attn_1"
    weight = state[f"{name}.q.weight"]
    for both in (
        state | {f"{name}.to_q.weight": weight.squeeze()},
        {f"{name}.query.weight": weight.squeeze()} | state,
        state | {f"{name}.to_q.weight": weight.squeeze(), f"{name}.query.weight": weight},
    ):
        write_ckpt(both, file)
        actual = convert_checkpoint(file).vae.state_dict()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
    for both in (
        state | {f"{name}.to_q.weight": weight.squeeze() + 1},
        {f"{name}.query.weight": weight.squeeze() + 1} | state,
        state | {f"{name}.to_out.0.bias": state[f"{name}.proj_out.bias"] + 1},
    ):
        write_ckpt(both, file)
        for use in (convert_checkpoint, describe_checkpoint):
            with pytest.raises(ModelError, match=r"attn_1\.\S+` and `\S+attn_1\.\S+` are the same layer's"):
                use(file)


def test_two_namings_of_the_text_encoder(source: LatentDiffusion, file: Path) -> None:
    """With the level `text_model` and without it, as two versions of transformers wrote it."""
    state = original_state(source)
    prefix = "cond_stage_model.transformer."
    has_level = any(name.startswith(f"{prefix}text_model.") for name in state)
    name = next(name for name in state if name.endswith("final_layer_norm.weight") and name.startswith(prefix))
    other = name.replace("text_model.", "") if has_level else name.replace(prefix, f"{prefix}text_model.")
    expected = convert_checkpoint(file).text_encoders["text_encoder"].final_layer_norm.weight.clone()
    write_ckpt(state | {other: state[name]}, file)
    actual = convert_checkpoint(file).text_encoders["text_encoder"].final_layer_norm.weight
    assert torch.equal(actual, expected)
    for both in (state | {other: state[name] + 1}, {other: state[name] + 1} | state):
        write_ckpt(both, file)
        for use in (convert_checkpoint, describe_checkpoint):
            with pytest.raises(ModelError, match=r"text encoder's `\S+` and `\S+` are the same layer's"):
                use(file)


@pytest.mark.parametrize("old", [False, True])
def test_the_first_stages_attention_in_diffusers_names(source: LatentDiffusion, file: Path, old: bool) -> None:
    """kohya-ss/sd-scripts issue 618: the names map one to one, and matrices are 1x1 convolutions."""
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
    if old:
        names = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn", "norm": "group_norm"}
    renamed = {}
    for name, value in original_state(source).items():
        head, middle, tail = name.partition(".mid.attn_1.")
        leaf, _, kind = tail.partition(".")
        renamed[f"{head}{middle}{names[leaf]}.{kind}" if tail else name] = value.squeeze() if tail else value
    expected = convert_checkpoint(file).vae.state_dict()
    write_ckpt(renamed, file)
    actual = convert_checkpoint(file).vae.state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert any("first stage's attention" in text for label, text in describe(str(file)) if label == "corrected")
