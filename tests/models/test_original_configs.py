"""Original YAMLs and marks in a file: what changes the arithmetic is computed or refused by name, and bombs end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qdeploy.base.errors import ModelError
from qdeploy.inspection.describe import describe
from qdeploy.models.checkpoints import convert_checkpoint, describe_checkpoint
from qdeploy.models.options import ModelOptions
from qdeploy.models.single_file import hash_source
from qdeploy.sampling import check_scheduler, make_scheduler
from tests.models.original_files import edit_yaml, original_state, write_ckpt
from tests.models.original_ldm import LatentDiffusion, tiny


def run_text(file: Path, tokens: Tensor) -> Tensor:
    encoder = convert_checkpoint(file).text_encoders["text_encoder"]
    with torch.no_grad():
        return encoder(tokens).last_hidden_state


@pytest.mark.parametrize(
    ("params", "index"),
    [
        ({"layer": "hidden", "layer_idx": -2}, -2),
        ({"layer": "hidden", "layer_idx": -1}, -1),
        ({"layer": "hidden", "layer_idx": 1}, 1),
        ({"layer": "penultimate"}, -2),
        ({"layer": "last", "layer_idx": None}, -1),
        ({"version": "openai/clip-vit-large-patch14", "max_length": 77, "freeze": True}, -1),
    ],
)
def test_clip_skip(source: LatentDiffusion, file: Path, params: dict[str, Any], index: int) -> None:
    """The output of an earlier layer through the final norm, as diffusers' ``clip_skip`` and web UIs have it."""
    tokens = torch.randint(0, 514, (2, 77), generator=torch.Generator().manual_seed(0))
    edit_yaml(file, "cond_stage_config.params", **params)
    text: Any = source.cond_stage_model.transformer  # type: ignore[union-attr]
    with torch.no_grad():
        hidden = text(tokens, output_hidden_states=True).hidden_states[index]
        norm = text.text_model.final_layer_norm if hasattr(text, "text_model") else text.final_layer_norm
        expected = norm(hidden)
    actual = run_text(file, tokens)
    assert (actual - expected).abs().max() / expected.abs().max() < 1e-5
    lines = [text for text in describe_checkpoint(file).corrections if "through the final norm" in text]
    assert len(lines) == (params.get("layer") in ("hidden", "penultimate"))
    last = run_text(edit_yaml(file, "cond_stage_config.params", layer="last").with_suffix(".ckpt"), tokens)
    assert (index == -1) == torch.allclose(actual, last, atol=1e-4)


@pytest.mark.parametrize(
    "params",
    [
        {"layer": "pooled"}, {"layer": "hidden"}, {"layer": "hidden", "layer_idx": 0}, {"layer": ["last"]},
        {"layer": "hidden", "layer_idx": -3}, {"layer": "hidden", "layer_idx": 1.5},
        {"layer": "hidden", "layer_idx": 10**30}, {"max_length": 10}, {"always_return_pooled": True},
    ],
    ids=str,
)  # fmt: skip
def test_text_layers_that_are_not_computed(file: Path, params: dict[str, Any]) -> None:
    edit_yaml(file, "cond_stage_config.params", **params)
    with pytest.raises(ModelError, match=r"model\.yaml.*(layer|max_length|always_return_pooled)"):
        convert_checkpoint(file)


def test_the_yaml_next_to_the_file_is_read(file: Path) -> None:
    edit_yaml(file, "", parameterization="v")
    assert convert_checkpoint(file).scheduler_config["prediction_type"] == "v_prediction"
    digest = hash_source(file, ModelOptions())
    given = edit_yaml(file, "", parameterization="eps").rename(file.with_name("given.yaml"))
    assert convert_checkpoint(file, given).scheduler_config["prediction_type"] == "epsilon"
    assert len({digest, hash_source(file, ModelOptions(config=given))}) == 2
    given.rename(file.with_suffix(".yaml"))
    (text,) = [text for label, text in describe(str(file)) if label == "corrected"]
    assert text.startswith("model.yaml next to the file")
    for content in ("a: b", "model: {params: {unet_config: {params: [1]}}}", "epochs: 3\nmodel: sd"):
        file.with_suffix(".yaml").write_text(content)
        for use in (convert_checkpoint, describe_checkpoint):
            with pytest.raises(ModelError, match=r"model\.yaml.*lies next to the checkpoint.*rename it"):
                use(file)
    file.with_suffix(".yaml").rename(file.with_name("other.yaml"))
    with pytest.raises(ModelError, match=r"other\.yaml has no `model\.params`") as caught:
        convert_checkpoint(file, file.with_name("other.yaml"))
    assert "lies next to" not in str(caught.value)


def test_v_prediction_needs_no_yaml_where_the_file_is_marked(source: LatentDiffusion, file: Path) -> None:
    """A1111 issue 16567: `v_pred` and `ztsnr` are empty tensors."""
    for marks, expected in (
        (("v_pred",), ("PNDMScheduler", "v_prediction", None, None)),
        (("v_pred", "ztsnr"), ("DDIMScheduler", "v_prediction", True, "trailing")),
        (("ztsnr",), ("DDIMScheduler", "epsilon", True, "leading")),
    ):
        write_ckpt(original_state(source) | {name: torch.tensor([]) for name in marks}, file)
        config = convert_checkpoint(file).scheduler_config
        names = ("_class_name", "prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
        assert tuple(config.get(name) for name in names) == expected
        check_scheduler(config)
        assert make_scheduler(config, 10).timesteps.max() == (999 if expected[3] == "trailing" else 901)
        assert len([text for label, text in describe(str(file)) if label == "corrected"]) == len(marks) + 1
    edit_yaml(file, "", parameterization="eps")
    write_ckpt(original_state(source) | {"v_pred": torch.tensor([])}, file)
    with pytest.raises(ModelError, match=r"mark `v_pred`.*`parameterization` 'eps'"):
        convert_checkpoint(file)


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("", {"given_betas": [0.1]}, "`given_betas`"),
        ("", {"split_input_params": {"ks": 8}}, "`split_input_params`"),
        ("", {"conditioning_key": "concat"}, "`conditioning_key`: got 'concat'"),
        ("", {"parameterization": "flow"}, "`parameterization` is 'flow'"),
        ("", {"beta_schedule": "cosine"}, "`beta_schedule` is 'cosine'"),
        ("", {"use_zero_snr": True}, "`use_zero_snr`: got True"),
        ("", {"image_size": 0}, "`image_size` is 0"),
        ("", {"image_size": 7.5}, "`image_size` is 7.5"),
        ("", {"image_size": -8}, "`image_size` is -8"),
        ("", {"image_size": float("nan")}, "`model.params.image_size` is nan"),
        ("", {"image_size": 10**12}, "`image_size` is 1000000000000"),
        ("", {"scale_factor": 0}, "`scale_factor` is 0"),
        ("", {"scale_factor": [1, 2]}, r"`scale_factor` is \[1, 2\]"),
        ("", {"timesteps": 10**9}, "`timesteps` is 1000000000"),
        ("", {"linear_start": "0.1.2"}, "`linear_start` is '0.1.2'"),
        ("unet_config", {"target": "ldm.modules.diffusionmodules.openaimodel.EncoderUNetModel"}, "`target`"),
        ("unet_config.params", {"context_dim": [1]}, r"`context_dim` is \(1,\)"),
        ("unet_config.params", {"dims": 3}, "`dims`: got 3, expected 2"),
        ("unet_config.params", {"conv_resample": False}, "`conv_resample`: got False"),
        ("unet_config.params", {"num_classes": 10}, "`num_classes`: got 10"),
        ("unet_config.params", {"use_spatial_transformer": False}, "`use_spatial_transformer`"),
        ("unet_config.params", {"transformer_depth": 2}, "`transformer_depth` is 2"),
        ("unet_config.params", {"use_new_attention_order": 1}, "`use_new_attention_order` is 1"),
        ("first_stage_config", {"target": "ldm.models.autoencoder.VQModel"}, "expected a class AutoencoderKL"),
        ("first_stage_config.params.ddconfig", {"tanh_out": True}, "`tanh_out`: got True"),
        ("first_stage_config.params.ddconfig", {"attn_type": "linear"}, "`attn_type`"),
        ("first_stage_config.params.ddconfig", {"double_z": False}, "`double_z` is False"),
        ("first_stage_config.params", {"new_key": 1}, "`new_key`: got 1, expected no such key"),
        ("first_stage_config", {"params": [1]}, r"`first_stage_config` `params` is \[1\], expected settings by name"),
        ("first_stage_config.params", {"ddconfig": "all"}, "`first_stage_config` `ddconfig` is 'all'"),
        ("unet_config.params", {"attention_resolutions": "4, 2, 1"}, "`attention_resolutions` is '4, 2, 1'"),
        ("unet_config.params", {"attention_resolutions": [4, "2"]}, "`attention_resolutions` is "),
        ("unet_config.params", {"attention_resolutions": [8]}, r"`attention_resolutions` is \[8\], the checkpoint's"),
        ("unet_config", {"params": "none"}, "`unet_config` `params` is 'none'"),
        ("cond_stage_config", {"params": 3}, "`cond_stage_config` `params` is 3"),
        ("", {"timesteps": 4000}, "`timesteps` are not those of the file's `betas`"),
        ("", {"beta_schedule": "sqrt_linear"}, "`beta_schedule`.* are not those of the file's `betas`"),
        ("cond_stage_config", {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"}, "`target`"),
    ],
)  # fmt: skip
def test_keys_that_change_the_arithmetic_are_refused(
    file: Path, section: str, values: dict[str, Any], words: str
) -> None:
    edit_yaml(file, section, **values)
    if "scale_factor" in values:  # the file's buffer comes first
        state = {k: v for k, v in torch.load(file)["state_dict"].items() if k != "scale_factor"}
        write_ckpt(state, file)
    with pytest.raises(ModelError, match=words):
        convert_checkpoint(file)


def test_published_yamls_keys_are_known(file: Path) -> None:
    """v1-inference.yaml's, with its comments' keys."""
    edit_yaml(
        file, "", num_timesteps_cond=1, log_every_t=200, first_stage_key="jpg", cond_stage_key="txt", channels=4,
        cond_stage_trainable=False, conditioning_key="crossattn", monitor="val/loss_simple_ema", use_ema=False,
        scheduler_config={"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": {"f_start": [1.0e-06]}},
        loss_type="l1",
    )  # fmt: skip
    edit_yaml(
        file, "unet_config.params", image_size=32, use_spatial_transformer=True, transformer_depth=1,
        use_checkpoint=True, legacy=False, dropout=0.1,
    )  # fmt: skip
    edit_yaml(file, "first_stage_config", target="ldm.models.autoencoder.AutoencoderKL")
    edit_yaml(file, "first_stage_config.params", monitor="val/rec_loss", lossconfig={"target": "torch.nn.Identity"})
    edit_yaml(
        file, "first_stage_config.params.ddconfig", double_z=True, resolution=256, attn_resolutions=[], dropout=0.0
    )
    assert convert_checkpoint(file).kind == "sd1"


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (torch.tensor(0.0), "`scale_factor` is"), (torch.tensor(float("nan")), "`scale_factor` is"),
        (torch.tensor([0.1, 0.2]), "`scale_factor` is"), (torch.tensor(-1.0), "`scale_factor` is"),
    ],
)  # fmt: skip
def test_a_scale_that_is_none(source: LatentDiffusion, file: Path, scale: Tensor, words: str) -> None:
    write_ckpt(original_state(source) | {"scale_factor": scale}, file)
    with pytest.raises(ModelError, match=words):
        convert_checkpoint(file)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'}, *a]\n" for i in range(30)),
        "model: " + "[" * 10_000,
        "model: {params: {unet_config: " + "{a: " * 3000,
        "a: b\n" * 60_000,
        "\x00",
    ],
    ids=["aliases", "depth", "open", "long", "nul"],
)
def test_yaml_bombs_end_at_once(file: Path, text: str) -> None:
    file.with_suffix(".yaml").write_text(text)
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"model\.yaml"):
        convert_checkpoint(file)
    assert time.monotonic() - start < 10


def test_inspect_finds_what_loading_would_find(source: LatentDiffusion, file: Path) -> None:
    write_ckpt(original_state(source) | {"first_stage_model.decoder.mid.attn_1.other.weight": torch.zeros(2)}, file)
    with pytest.raises(ModelError, match=r"first stage.*fit no layer.*other\.weight"):
        describe_checkpoint(file)
    file.with_suffix(".yaml").unlink()
    write_ckpt(original_state(source), file)
    assert any("attention heads" in text for text in describe_checkpoint(file).missing)


def test_heads_are_guessed_for_published_widths_only(tmp_path: Path) -> None:
    """A churches UNet of 32 channels may have 4 heads; 8 would fit every tensor and spoil every picture."""
    path = write_ckpt(original_state(LatentDiffusion(tiny("lsun_churches256"))), tmp_path / "churches.ckpt")
    with pytest.raises(ModelError, match=r"model_channels 32 .*--config"):
        convert_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("control_model.input_blocks.0.0.weight", "is a ControlNet.*give the model that it controls"),
        ("embedding_manager.string_to_param_dict.x", "textual inversion.*diffusers folder"),
        ("denoiser.sigmas", "save it without `denoiser.sigmas`"),
    ],
)
def test_tensors_of_other_things_have_a_remedy(source: LatentDiffusion, file: Path, name: str, words: str) -> None:
    save_file(
        {key: value.contiguous() for key, value in original_state(source).items()} | {name: torch.zeros(3)},
        file.with_suffix(".safetensors"),
    )
    for use in (convert_checkpoint, describe_checkpoint):
        with pytest.raises(ModelError, match=words):
            use(file.with_suffix(".safetensors"))
