"""Original checkpoints, converted: every module computes what the original computes, from every kind of file."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qdeploy.base.errors import ModelError
from qdeploy.models.checkpoints import (
    ConvertedCheckpoint,
    convert_checkpoint,
    describe_checkpoint,
    detect_kind,
    heads,
    read_checkpoint,
)
from qdeploy.sampling import make_scheduler
from tests.models.original_files import original_state, write_ckpt, write_yaml
from tests.models.original_ldm import FULL, LatentDiffusion, Sizes, tiny

ROUND_OFF = {torch.float32: 1e-5, torch.float64: 1e-12}  # of the largest value; 5e-6 and 1e-14 are met
KINDS = {"lsun_beds256": "ldm-uncond", "lsun_churches256": "ldm-uncond", "sd-v1-4": "sd1", "sd-v2-1": "sd2"}


@cache
def original(name: str) -> LatentDiffusion:
    return LatentDiffusion(tiny(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny file of each kind, ``NAME.ckpt`` with and without averaged weights, ``.safetensors`` and ``.yaml``."""
    made = tmp_path_factory.mktemp("checkpoints")
    for name in FULL:
        state = original_state(original(name))
        write_ckpt(state, made / f"{name}.ckpt")
        write_ckpt(original_state(original(name), ema=True), made / f"{name}-ema.ckpt")
        save_file({key: value.contiguous() for key, value in state.items()}, made / f"{name}.safetensors")
        write_yaml(original(name).sizes, made / f"yaml-of-{name}.yaml")  # NAME.yaml would be read without being given
    return made


@pytest.fixture(autouse=True)
def narrow_ones_are_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny files have the heads of the published ones, so that most tests need no YAML."""
    narrow = {(kind, width, mult): found for (kind, _, mult), found in heads.PUBLISHED.items() for width in (32, 64)}
    monkeypatch.setattr(heads, "PUBLISHED", {**heads.PUBLISHED, **narrow})


def assert_close(actual: Tensor, expected: Tensor, round_off: float | None = None) -> None:
    assert actual.shape == expected.shape
    assert expected.isfinite().all()
    assert expected.std() > 0.01  # else nothing is compared
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= (ROUND_OFF[expected.dtype] if round_off is None else round_off), f"{error:.1e}"


def inputs_for(sizes: Sizes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Small and seeded, for every part."""
    torch.manual_seed(5)
    inputs = {
        "x": torch.randn(2, sizes.unet.in_channels, 16, 16, dtype=dtype),
        "timesteps": torch.tensor([3, 741]),
        "image": torch.rand(1, 3, 32, 32, dtype=dtype) * 2 - 1,
        "latents": torch.randn(2, sizes.first_stage.embed_dim, 6, 6, dtype=dtype),
    }
    if sizes.text is not None:
        inputs["context"] = torch.randn(2, 7, sizes.text.width, dtype=dtype)
        inputs["tokens"] = torch.randint(0, sizes.text.vocab_size, (2, 77))
    return inputs


@torch.no_grad()
def run_original(source: LatentDiffusion, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    source.to(inputs["x"].dtype)
    first = source.first_stage_model
    outputs = {
        "noise": source.model.diffusion_model(inputs["x"], inputs["timesteps"], inputs.get("context")),
        "encoded": first.encode(inputs["image"]),
        "decoded": first.decode(inputs["latents"]),
    }
    return outputs | ({"hidden": source.cond_stage_model(inputs["tokens"])} if "tokens" in inputs else {})


@torch.no_grad()
def run_converted(model: ConvertedCheckpoint, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = (model.unet, model.vae, *model.text_encoders.values())
    unet, vae, *text = (nn.Module.to(part, inputs["x"].dtype) for part in parts)
    context = [inputs["context"]] if "context" in inputs else []
    encoded = vae.encode(inputs["image"], return_dict=False)[0]
    outputs = {
        "noise": unet(inputs["x"], inputs["timesteps"], *context, return_dict=False)[0],
        "encoded": encoded if isinstance(encoded, Tensor) else encoded.parameters,
        "decoded": vae.decode(inputs["latents"], return_dict=False)[0],
    }
    return outputs | ({"hidden": text[0](inputs["tokens"]).last_hidden_state} if text else {})


def assert_same(model: ConvertedCheckpoint, source: LatentDiffusion, dtype: torch.dtype = torch.float32) -> None:
    inputs = inputs_for(source.sizes, dtype)
    actual, expected = run_converted(model, inputs), run_original(source, inputs)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name])


@pytest.mark.parametrize(("suffix", "yaml"), [("ckpt", False), ("safetensors", True)])
@pytest.mark.parametrize("name", FULL)
def test_every_part_computes_what_the_original_does(folder: Path, name: str, suffix: str, yaml: bool) -> None:
    source = original(name)
    model = convert_checkpoint(folder / f"{name}.{suffix}", folder / f"yaml-of-{name}.yaml" if yaml else None)
    assert model.kind == KINDS.get(name, "ldm-text2img")
    assert (not model.text_encoders) == (source.sizes.text is None)
    assert_same(model, source)


@pytest.mark.parametrize("name", FULL)
def test_in_float64_nothing_is_left_but_round_off(folder: Path, name: str) -> None:
    assert_same(convert_checkpoint(folder / f"{name}.ckpt"), LatentDiffusion(tiny(name)), torch.float64)


@pytest.mark.parametrize("name", FULL)
def test_the_averaged_unet(folder: Path, name: str) -> None:
    path = folder / f"{name}-ema.ckpt"
    source = LatentDiffusion(tiny(name))
    inputs = inputs_for(source.sizes)
    last = run_original(source, inputs)["noise"]
    assert_close(run_converted(convert_checkpoint(path), inputs)["noise"], last)
    shadow = read_checkpoint(path)
    with torch.no_grad():
        for key, value in source.model.named_parameters():
            value.copy_(shadow["model_ema." + key.replace(".", "")])
    assert_same(convert_checkpoint(path, ema=True), source)
    averaged = run_original(source, inputs)["noise"]
    assert (averaged - last).abs().max() > 100 * ROUND_OFF[torch.float32] * last.abs().max()


def test_averaged_weights_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lsun_beds256.ckpt.*no averaged weights"):
        convert_checkpoint(folder / "lsun_beds256.ckpt", ema=True)
    state = original_state(original("lsun_beds256"), ema=True)
    del state["model_ema.diffusion_modelout2bias"]
    with pytest.raises(ModelError, match=r"model_ema\.diffusion_modelout2bias"):
        convert_checkpoint(write_ckpt(state, tmp_path / "cut.ckpt"), ema=True)


@pytest.mark.parametrize(
    ("name", "start", "end", "scale", "side", "channels"),
    [
        ("lsun_beds256", 0.0015, 0.0195, 1.0, 64, 3),
        ("lsun_churches256", 0.0015, 0.0155, 0.2275, 32, 4),
        ("text2img256", 0.0015, 0.0195, 1.0, 64, 3),
        ("txt2img-1p4B", 0.00085, 0.012, 0.18215, 32, 4),
        ("sd-v1-4", 0.00085, 0.012, 0.18215, 64, 4),
    ],
)
@pytest.mark.parametrize("yaml", [False, True])
def test_schedule_and_scale(
    folder: Path, name: str, start: float, end: float, scale: float, side: int, channels: int, yaml: bool
) -> None:
    model = convert_checkpoint(folder / f"{name}.ckpt", folder / f"yaml-of-{name}.yaml" if yaml else None)
    config = model.scheduler_config
    assert (config["beta_start"], config["beta_end"], config["num_train_timesteps"]) == (start, end, 1000)
    assert (config["beta_schedule"], config["prediction_type"]) == ("scaled_linear", "epsilon")
    assert model.scaling_factor == pytest.approx(scale, rel=1e-6)
    assert model.vae.config.scaling_factor == model.scaling_factor
    assert (model.sample_size, model.unet.config.sample_size, model.unet.config.in_channels) == (side, side, channels)
    timesteps = make_scheduler(config, 10).timesteps
    assert sorted(timesteps)[0] == 1  # the original's steps start at 1
    assert bool(model.missing) == bool(model.text_encoders)


def test_facts_without_building(folder: Path) -> None:
    facts = describe_checkpoint(folder / "sd-v1-4-ema.ckpt")
    assert (facts.kind, facts.latents, facts.image_side, facts.ema) == ("sd1", (4, 64, 64), 512, True)
    source = original("sd-v1-4")
    parts = {"unet": source.model, "vae": source.first_stage_model, "text_encoder": source.cond_stage_model}
    assert facts.parameters == {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert "vocab.json" in facts.missing[0]
    facts = describe_checkpoint(folder / "lsun_churches256.ckpt")
    assert (facts.kind, facts.latents, facts.ema, facts.missing) == ("ldm-uncond", (4, 32, 32), False, ())


def test_half_precision_is_widened(tmp_path: Path) -> None:
    source = LatentDiffusion(tiny("lsun_beds256"))
    halved = {name: value.half() for name, value in original_state(source).items()}
    model = convert_checkpoint(write_ckpt(halved, tmp_path / "half.ckpt"))
    assert {value.dtype for value in model.unet.state_dict().values()} == {torch.float32}
    assert_same(model, source.half().float())


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_weights_stay_in_the_file(folder: Path, suffix: str) -> None:
    path = folder / f"lsun_beds256.{suffix}"
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs Linux's /proc to see what is mapped")
    model = convert_checkpoint(path)
    lines = [line.split() for line in maps.read_text().splitlines() if line.endswith(str(path))]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    for weight in (model.unet.conv_in.weight, model.vae.decoder.conv_out.weight):
        assert any(start <= weight.data_ptr() < end for start, end in ranges)


def test_an_inpainting_unet_and_the_new_attention_order(tmp_path: Path) -> None:
    sizes = tiny("sd-v1-4")
    nine = LatentDiffusion(replace(sizes, unet=replace(sizes.unet, in_channels=9)))
    assert_same(convert_checkpoint(write_ckpt(original_state(nine), tmp_path / "inpainting.ckpt")), nine)
    sizes = tiny("lsun_churches256")
    ordered = LatentDiffusion(replace(sizes, unet=replace(sizes.unet, use_new_attention_order=True)))
    path = write_ckpt(original_state(ordered), tmp_path / "ordered.ckpt")
    assert_same(convert_checkpoint(path, write_yaml(ordered.sizes, tmp_path / "ordered.yaml")), ordered)


def test_an_unpublished_width_needs_the_yaml(tmp_path: Path) -> None:
    sizes = tiny("lsun_beds256")
    other = LatentDiffusion(replace(sizes, unet=replace(sizes.unet, channel_mult=(1, 2), num_head_channels=16)))
    path = write_ckpt(original_state(other), tmp_path / "other.ckpt")
    with pytest.raises(ModelError, match=r"other.ckpt: .*attention heads.*--config"):
        convert_checkpoint(path)
    assert_same(convert_checkpoint(path, write_yaml(other.sizes, tmp_path / "other.yaml")), other)


def change_state(name: str, **changes: Tensor | None) -> dict[str, Tensor]:
    state: dict[str, Any] = {**original_state(original(name)), **changes}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("lsun_beds256", {"model.diffusion_model.out.2.bias": None}, "UNet.*1 are missing.*conv_out.bias"),
        ("lsun_beds256", {"model.diffusion_model.out.2.bias": torch.zeros(5)}, "UNet.*another shape.*conv_out.bias"),
        ("lsun_beds256", {"model.diffusion_model.label_emb.weight": torch.zeros(5, 5)}, "UNet.*label_emb.weight"),
        ("lsun_beds256", {"model.diffusion_model.input_blocks.0.0.weight": None}, "input_blocks.0.0.weight.*missing"),
        ("lsun_beds256", {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(3)}, "shapes"),
        ("lsun_beds256", {"first_stage_model.encoder.down.1.attn.0.q.weight": torch.zeros(2)}, "first stage.*attn"),
        ("lsun_beds256", {"first_stage_model.quantize.embedding.weight": torch.zeros(64, 4)}, "first stage.*quantize"),
        ("sd-v1-4", {"cond_stage_model.transformer.text_model.final_layer_norm.bias": None}, "text encoder.*norm.bias"),
        ("sd-v1-4", {"cond_stage_model.adapter.weight": torch.zeros(2)}, "outside its transformer"),
        ("txt2img-1p4B", {"cond_stage_model.transformer.memory_tokens": torch.zeros(2)}, "text encoder.*memory_tokens"),
        ("sd-v1-4", {"control_model.weight": torch.zeros(2)}, "is a ControlNet.*give the model that it controls"),
        ("sd-v1-4", {"cond_stage_model.model.positional_embedding": torch.zeros(2)}, "outside its transformer"),
        ("sd-v1-4", {"conditioner.embedders.0.weight": torch.zeros(2)}, "Stable Diffusion XL"),
        ("sd-v2-1", {"conditioner.embedders.0.model.ln_final.bias": torch.zeros(2)}, "is the refiner of"),
        ("sd-v2-1", {"cond_stage_model.model.visual.proj": torch.zeros(2)}, "text encoder has .*visual.proj"),
        ("sd-v2-1", {"depth_model.x": torch.zeros(2)}, "depth map is not fed"),
        ("sd-v2-1", {"low_scale_model.x": torch.zeros(2)}, "upscaler"),
        ("sd-v2-1", {"noise_augmentor.x": torch.zeros(2)}, "Stable unCLIP"),
        ("sd-v2-1", {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(2, 2)}, "UNet.*label_emb"),
        ("sd-v1-4", {"model.diffusion_model.joint_blocks.0.x": torch.zeros(2)}, "is Stable Diffusion 3"),
        ("sd-v1-4", {"model.diffusion_model.double_blocks.0.x": torch.zeros(2)}, "is FLUX"),
        ("sd-v1-4", {"ip_adapter.1.to_k_ip.weight": torch.zeros(2)}, "is an IP-Adapter"),
        ("lsun_churches256", {"scale_factor": None}, "scale_factor.*--config"),
        ("lsun_churches256", {"betas": None}, "betas.*--config"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, name: str, changes: dict[str, Any], words: str) -> None:
    path = write_ckpt(change_state(name, **changes), tmp_path / "wrong.ckpt")
    with pytest.raises(ModelError, match=f"wrong.ckpt: .*({words})"):
        convert_checkpoint(path)


def test_known_extras_are_left_aside(tmp_path: Path) -> None:
    extras = {name: torch.zeros(2) for name in ("loss.discriminator.main.0.weight", "logvar", "posterior_mean_coef1")}
    path = write_ckpt(change_state("sd-v1-4", betas=None, **extras), tmp_path / "extras.ckpt")
    assert convert_checkpoint(path).scheduler_config["beta_end"] == 0.012


def test_a_schedule_that_is_no_ramp_is_kept_value_by_value(tmp_path: Path) -> None:
    betas = torch.linspace(0.0001, 0.03, 1000) ** 1.3
    path = write_ckpt(change_state("lsun_beds256", betas=betas), tmp_path / "ramp.ckpt")
    assert convert_checkpoint(path).scheduler_config["trained_betas"] == pytest.approx(betas.tolist())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("num_heads: 8", "num_heads: 7"), "7 does not divide"),
        (("model_channels: 32", "model_channels: 64"), r"model_channels.* is 64, .* say 32"),
        (("- 8\n", "- 16\n"), "attention_resolutions"),
        (("resblock_updown: true", "resblock_updown: false"), "resblock_updown"),
        (("z_channels: 4", "z_channels: 5"), "z_channels"),
        (("linear_end: 0.0155", "linear_end: 0.0195"), "linear_end"),
        (("linear_end: 0.0155", "linear_end: high"), "linear_end.*expected a number"),
        (("__is_unconditional__", "{target: x}"), "another kind of model"),
        (("  params:\n", "  other:\n"), "model.params"),
        (("model:\n", "model: !!python/object/apply:os.getcwd []\n"), "not readable as YAML"),
        (("num_heads: 8", "num_heads: -1"), "neither `num_heads`"),
        (
            ("num_heads: 8", "num_heads: 8\n        unused: 8"),
            r"`unet_config.params` `unused`: got 8, expected no such key",
        ),
    ],
)
def test_a_yaml_that_is_not_the_models(folder: Path, tmp_path: Path, change: tuple[str, str], words: str) -> None:
    text = (folder / "yaml-of-lsun_churches256.yaml").read_text()
    assert change[0] in text
    (tmp_path / "wrong.yaml").write_text(text.replace(*change, 1))
    with pytest.raises(ModelError, match=words):
        convert_checkpoint(folder / "lsun_churches256.ckpt", tmp_path / "wrong.yaml")


def test_kind_of_other_tensors() -> None:
    with pytest.raises(ModelError, match="no UNet"):
        detect_kind({"weight": torch.zeros(1)})
    with pytest.raises(ModelError, match="diffusers folder"):
        detect_kind({"down_blocks.0.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("step", "channels", "prediction", "side", "marked"),
    [(None, 4, "v_prediction", 96, True), (110_000, 4, "v_prediction", 96, True), (875_000, 4, "epsilon", 64, False),
     (None, 9, "epsilon", 64, False)],
)  # fmt: skip
def test_what_stable_diffusion_2_predicts(
    tmp_path: Path, step: int | None, channels: int, prediction: str, side: int, marked: bool
) -> None:
    """As diffusers' ``_legacy_load_scheduler`` and its table of sizes have it."""
    sizes = tiny("sd-v2-1")
    source = LatentDiffusion(replace(sizes, unet=replace(sizes.unet, in_channels=channels)))
    path = write_ckpt(original_state(source), tmp_path / "v2.ckpt", global_step=step)
    model = convert_checkpoint(path)
    assert (model.scheduler_config["prediction_type"], model.sample_size) == (prediction, side)
    assert describe_checkpoint(path).image_side == 8 * side
    assert bool(model.corrections) == marked
    if channels != 4:
        return  # its YAML states a conditioning key too
    base = replace(sizes, parameterization=None)
    stated = convert_checkpoint(path, write_yaml(base, tmp_path / "base.yaml"))
    assert (stated.scheduler_config["prediction_type"], stated.sample_size, stated.corrections) == ("epsilon", 64, ())
