"""LoRA files in every layout against weights fused by hand, and every file that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

from qdeploy.base.errors import ModelError, UsageError
from qdeploy.calibrate.dataset_file import save_calibration
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.cli import main
from qdeploy.models.lora import KOHYA_PREFIXES, METADATA, fuse_lora, list_addresses
from qdeploy.models.options import LoraFile, ModelOptions
from qdeploy.models.source import LatentDiffusion, load_model

RANK, ALPHA, SCALE = 3, 1.5, 0.7
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV3 = "mid_block.resnets.0.conv1"
CONV1 = "mid_block.attentions.0.proj_in"
TEXT_Q = "encoder.layers.1.self_attn.q_proj"
TEXT_FC = "encoder.layers.0.mlp.fc1"

Naming = Callable[[str, str], tuple[str, str]]  # (component, layer) -> names of down and up


def kohya(component: str, layer: str) -> tuple[str, str]:
    prefix = "lora_unet_" if component == "unet" else "lora_te_text_model_"
    name = prefix + layer.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight"


def peft(component: str, layer: str) -> tuple[str, str]:
    name = f"{component}.{'' if component == 'unet' else 'text_model.'}{layer}"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def diffusers_lora(component: str, layer: str) -> tuple[str, str]:
    name = f"{component}.{'' if component == 'unet' else 'text_model.'}{layer}"
    return f"{name}.lora.down.weight", f"{name}.lora.up.weight"


def older(component: str, layer: str) -> tuple[str, str]:
    old = {TO_Q: TO_Q.replace("to_q", "processor.to_q"), TO_OUT: TO_OUT.replace("to_out.0", "processor.to_out")}
    text = f"text_model.{layer}".replace("q_proj", "to_q")
    name = f"unet.{old[layer]}" if component == "unet" else f"text_encoder.{text}"
    return f"{name}_lora.down.weight", f"{name}_lora.up.weight"


def bare(_: str, layer: str) -> tuple[str, str]:
    """As the UNet's ``save_attn_procs`` writes it."""
    name = {TO_Q: TO_Q.replace("to_q", "processor.to_q")}[layer]
    return f"{name}_lora.down.weight", f"{name}_lora.up.weight"


def pair_for(weight: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(RANK, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], RANK, *([1, 1] if weight.dim() == 4 else []), generator=generator)
    return down, up


def by_hand(weight: Tensor, down: Tensor, up: Tensor, factor: float) -> Tensor:
    if weight.dim() == 2:
        return weight + factor * (up @ down)
    return weight + factor * torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)


def get_layer(model: LatentDiffusion, component: str, layer: str) -> nn.Module:
    return model.component(component).inner.get_submodule(layer)


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata=metadata or None)
    return path


@pytest.mark.parametrize(
    ("naming", "layers"),
    [
        (kohya, [("unet", TO_Q), ("unet", TO_OUT), ("unet", CONV3), ("unet", CONV1), ("text_encoder", TEXT_FC)]),
        (peft, [("unet", TO_Q), ("unet", CONV3), ("unet", CONV1), ("text_encoder", TEXT_Q)]),
        (diffusers_lora, [("unet", TO_OUT), ("text_encoder", TEXT_FC)]),
        (older, [("unet", TO_Q), ("unet", TO_OUT), ("text_encoder", TEXT_Q)]),
        (bare, [("unet", TO_Q)]),
    ],
)
@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_every_layout_against_a_hand_fused_weight(
    tiny_model: LatentDiffusion, tmp_path: Path, naming: Naming, layers: list[tuple[str, str]], alpha: float | None
) -> None:
    tensors, expected = {}, {}
    for number, (component, layer) in enumerate(layers):
        weight = get_layer(tiny_model, component, layer).weight
        down, up = pair_for(weight, number)
        down_name, up_name = naming(component, layer)
        tensors |= {down_name: down, up_name: up}
        if alpha is not None:
            root = down_name.removesuffix(".weight").removesuffix(".lora_down").removesuffix(".lora_A")
            root = root.removesuffix(".lora.down").removesuffix("_lora.down")
            tensors[f"{root}.alpha"] = torch.tensor(alpha)
        factor = SCALE * (1 if alpha is None else alpha / RANK)
        expected[component, layer] = by_hand(weight, down, up, factor)
    before = {key: get_layer(tiny_model, *key).weight.clone() for key in expected}
    fused = fuse_lora(tiny_model, write(tmp_path / "a.safetensors", tensors), SCALE)
    for key, weight in expected.items():
        assert torch.allclose(get_layer(fused, *key).weight, weight, atol=1e-5)
        assert not torch.allclose(get_layer(fused, *key).weight, before[key], atol=1e-2)
        assert torch.equal(get_layer(tiny_model, *key).weight, before[key])
    assert fused.vae_decoder is tiny_model.vae_decoder


def unet_pair(model: LatentDiffusion, naming: Naming = peft, layer: str = TO_Q) -> dict[str, Tensor]:
    return dict(zip(naming("unet", layer), pair_for(get_layer(model, "unet", layer).weight), strict=True))


@pytest.mark.parametrize(
    ("config", "strength"),
    [
        ({"unet.lora_alpha": 6}, 2.0),
        ({"unet.lora_alpha": 6, "unet.use_rslora": True}, 6 / 3**0.5),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_q": 9}}, 3.0),
        ({"text_encoder.lora_alpha": 6}, 1.0),
    ],
)
def test_peft_settings_in_the_metadata(
    tiny_model: LatentDiffusion, tmp_path: Path, config: dict, strength: float
) -> None:
    tensors = unet_pair(tiny_model)
    file = write(tmp_path / "a.safetensors", tensors, **{METADATA: json.dumps(config)})
    down, up = tensors.values()
    expected = by_hand(get_layer(tiny_model, "unet", TO_Q).weight, down, up, strength)
    assert torch.allclose(get_layer(fuse_lora(tiny_model, file), "unet", TO_Q).weight, expected, atol=1e-5)


def test_the_sha256_tells_models_apart(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    first = write(tmp_path / "a.safetensors", unet_pair(tiny_model))
    second = write(tmp_path / "b.safetensors", unet_pair(tiny_model, layer=TO_OUT))
    fused = [fuse_lora(tiny_model, first), fuse_lora(tiny_model, first, 0.5), fuse_lora(tiny_model, second)]
    assert len({tiny_model.sha256, *(model.sha256 for model in fused)}) == 4
    assert fuse_lora(tiny_model, first, 0.5).sha256 == fused[1].sha256
    both = fuse_lora(fused[1], second)
    assert both.provenance["loras"] == ["a.safetensors:0.5", "b.safetensors:1"]
    options = ModelOptions((LoraFile(first, 0.5), LoraFile(second)))
    assert load_model(tiny_model.source, options).sha256 == both.sha256


def test_every_layer_has_names_of_its_own(tiny_model: LatentDiffusion) -> None:
    addresses = list_addresses(tiny_model)
    for component in tiny_model.components[:2]:
        prefix = KOHYA_PREFIXES[component][0]
        inner = tiny_model.component(component).inner
        layers = [name for name, module in inner.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        assert [addresses[prefix + layer.replace(".", "_")].layer for layer in layers] == layers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update(t | {"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.ones(1, 1)}),
         "1 of 3 keys are for no layer of .*input_blocks_1_1_proj_in"),
        (lambda t: t.update({"unet.conv_in.hada_w1_a": torch.ones(1)}), "not a plain LoRA: .*hada_w1_a"),
        (lambda t: t.update({f"unet.{TO_Q}.lora_magnitude_vector": torch.ones(1)}), "DoRA"),
        (lambda t: t.update({f"unet.{TO_Q}.alpha": torch.tensor(float("nan"))}), "NaN"),
        (lambda t: t.update({f"unet.{TO_Q}.alpha": torch.ones(2)}), "malformed"),
        (lambda t: t.pop(f"unet.{TO_Q}.lora_B.weight"), "to_q has no up weight"),
        (lambda t: t.update({f"unet.{TO_Q}.lora_A.weight": torch.ones(RANK, 7)}), "another model"),
        (lambda t: t.update({f"unet.{TO_Q}.lora_B.weight": torch.ones(64, RANK + 1)}), "another model"),
        (lambda t: t.update({f"unet.{TO_Q}.lora_B.weight": torch.ones(())}), "malformed"),
        (lambda t: t.update({kohya("unet", TO_Q)[0]: torch.ones(RANK, 64)}), "twice"),
        (lambda t: t.clear(), "no tensors"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(tiny_model: LatentDiffusion, tmp_path: Path, change: Callable, words: str) -> None:
    tensors = unet_pair(tiny_model)
    change(tensors)
    with pytest.raises(ModelError, match=words):
        fuse_lora(tiny_model, write(tmp_path / "a.safetensors", tensors))


def test_files_that_are_no_safetensors(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    for path in (tmp_path / "a.pt", tmp_path / "none.safetensors"):
        with pytest.raises(ModelError, match=r"cannot be read as a LoRA in safetensors"):
            fuse_lora(tiny_model, path)
    file = write(tmp_path / "b.safetensors", unet_pair(tiny_model), **{METADATA: '{"unet.lora_alpha": "much"}'})
    with pytest.raises(ModelError, match=r"lora_alpha`: got 'much', expected a number"):
        fuse_lora(tiny_model, file)


def test_text_keys_for_an_unconditional_model(unconditional_folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())})
    with pytest.raises(ModelError, match="for no layer of"):
        fuse_lora(load_model(str(unconditional_folder)), file)


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [("a.safetensors", "a.safetensors", 1.0), ("a:b.safetensors:-0.5", "a:b.safetensors", -0.5), ("C:\\a", "C:\\a", 1)],
)
def test_the_option(text: str, path: str, scale: float) -> None:
    assert LoraFile.from_text(text) == LoraFile(Path(path), scale)
    for wrong in (":1", "a:nan", "a:inf"):
        with pytest.raises(UsageError, match="finite scale"):
            LoraFile.from_text(wrong)


@pytest.mark.exports
def test_the_commands_refuse_to_mix_models(tiny_folder: Path, tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    lora = f"{write(tmp_path / 'style.safetensors', unet_pair(tiny_model))}:0.5"
    fused = load_model(str(tiny_folder), ModelOptions((LoraFile.from_text(lora),)))
    calib, table = tmp_path / "c.safetensors", tmp_path / "q.safetensors"
    save_calibration(record_trajectories(fused, ["a cat"], TimestepAwareSettings(samples=1, steps=3, record=3)), calib)

    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["--quiet", *map(str, arguments)])
        return result.exit_code, result.output

    code, said = run("quantize", tiny_folder, "--calib", calib, "-o", table)
    assert (code, "made with another model" in said) == (1, True), said
    code, said = run("quantize", tiny_folder, "--calib", calib, "-o", table, "--lora", lora)
    assert code == 0, said
    code, said = run("export", table, "-o", tmp_path / "bundle")
    assert (code, "style.safetensors:0.5" in said and "--lora" in said) == (1, True), said
    code, said = run("export", table, "-o", tmp_path / "bundle", "--lora", lora)
    assert code == 0, said
    code, said = run("inspect", tmp_path / "bundle")
    assert "style.safetensors:0.5" in said
    code, said = run("calibrate", tiny_folder, "-o", tmp_path / "d", "--lora", tmp_path / "none.safetensors")
    assert (code, "cannot be read" in said) == (1, True), said


XL_LAYERS = {  # kohya's names of Stable Diffusion XL, in which the UNet's are the original's
    "lora_unet_input_blocks_1_0_in_layers_2": ("unet", "down_blocks.0.resnets.0.conv1"),
    "lora_unet_input_blocks_2_0_op": ("unet", "down_blocks.0.downsamplers.0.conv"),
    "lora_unet_input_blocks_3_1_proj_in": ("unet", "down_blocks.1.attentions.0.proj_in"),
    "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_k": (
        "unet", "mid_block.attentions.0.transformer_blocks.1.attn2.to_k",
    ),
    "lora_unet_middle_block_2_out_layers_3": ("unet", "mid_block.resnets.1.conv2"),
    "lora_unet_output_blocks_1_1_transformer_blocks_0_ff_net_2": (
        "unet", "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2",
    ),
    "lora_unet_output_blocks_1_2_conv": ("unet", "up_blocks.0.upsamplers.0.conv"),
    "lora_unet_output_blocks_3_0_skip_connection": ("unet", "up_blocks.1.resnets.1.conv_shortcut"),
    "lora_unet_label_emb_0_2": ("unet", "add_embedding.linear_2"),
    "lora_unet_time_embed_0": ("unet", "time_embedding.linear_1"),
    "lora_te1_text_model_encoder_layers_2_mlp_fc1": ("text_encoder", "encoder.layers.2.mlp.fc1"),
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj": (
        "text_encoder_2", "text_model.encoder.layers.0.self_attn.q_proj",
    ),
}  # fmt: skip


def test_names_of_stable_diffusion_xl(sdxl_folder: Path, tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    model = load_model(str(sdxl_folder))
    pairs = {
        key: pair_for(get_layer(model, *address).weight, seed)  # type: ignore[arg-type]
        for seed, (key, address) in enumerate(XL_LAYERS.items())
    }
    tensors = {
        f"{key}.lora_{which}.weight": pair[i] for key, pair in pairs.items() for i, which in ((0, "down"), (1, "up"))
    }
    fused = fuse_lora(model, write(tmp_path / "xl.safetensors", tensors), SCALE)
    for key, (component, layer) in XL_LAYERS.items():
        expected = by_hand(get_layer(model, component, layer).weight, *pairs[key], SCALE)  # type: ignore[arg-type]
        torch.testing.assert_close(get_layer(fused, component, layer).weight, expected)
    # diffusers maps the transformers of such files alike
    blocks = [key for key in tensors if "transformer_blocks" in key and "unet" in key]
    mapped = _maybe_map_sgm_blocks_to_diffusers({key: tensors[key] for key in blocks}, model.unet.inner.config)
    ours = {f"lora_unet_{XL_LAYERS[key.split('.')[0]][1].replace('.', '_')}.{key.partition('.')[2]}" for key in blocks}
    final = {"input_blocks": "down_blocks", "middle_block": "mid_block", "output_blocks": "up_blocks"}
    for old, new in final.items():  # which it renames in a later step
        mapped = {key.replace(old, new): value for key, value in mapped.items()}
    assert set(mapped) == ours


def test_a_lora_of_another_base(sdxl_folder: Path, tmp_path: Path) -> None:
    down, up = torch.ones(RANK, 32), torch.ones(32, RANK)
    keys = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{keys}.lora_down.weight": down, f"{keys}.lora_up.weight": up}
    with pytest.raises(ModelError, match=r"2 of 2 keys are for no layer of .*input_blocks_4_1"):
        fuse_lora(load_model(str(sdxl_folder)), write(tmp_path / "other.safetensors", tensors))
