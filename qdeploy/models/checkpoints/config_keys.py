"""Every key of an original YAML: read, without effect on the arithmetic, or refused by name.

The keys are those of CompVis' and Stability's published configurations and of the classes that they name
(``ldm/models/diffusion/ddpm.py``, ``ldm/modules/diffusionmodules/openaimodel.py``, ``ldm/models/autoencoder.py``,
``ldm/modules/encoders/modules.py``). A key that is not known could change what the model computes, so it is refused.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from qdeploy.base.errors import ModelError
from qdeploy.models.checkpoints.original_config import OriginalConfig

# Of each section: keys that other code here reads and checks against the tensors, or that only training reads.
MODEL_READ = (
    "linear_start", "linear_end", "timesteps", "beta_schedule", "parameterization", "scale_factor", "scale_by_std",
    "image_size", "unet_config", "first_stage_config", "cond_stage_config",
)  # fmt: skip
MODEL_TRAINING = (
    "num_timesteps_cond", "log_every_t", "first_stage_key", "cond_stage_key", "cond_stage_trainable", "channels",
    "monitor", "use_ema", "loss_type", "scheduler_config", "ckpt_path", "ignore_keys", "load_only_unet",
    "original_elbo_weight", "l_simple_weight", "logvar_init", "learn_logvar", "concat_mode", "clip_denoised",
    "unfreeze_model", "model_lr", "finetune_keys", "ucg_training", "base_learning_rate", "make_it_fit",
    "reset_ema", "reset_num_ema_updates", "force_null_conditioning", "conditioning_key",
)  # fmt: skip
UNET_READ = (
    "in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks", "context_dim",
    "use_scale_shift_norm", "resblock_updown", "attention_resolutions", "num_heads", "num_head_channels",
    "num_heads_upsample", "use_new_attention_order", "transformer_depth", "use_spatial_transformer",
    "use_linear_in_transformer",
)  # fmt: skip
UNET_TRAINING = ("image_size", "use_checkpoint", "legacy", "dropout", "use_fp16", "use_bf16")
STAGE_READ = ("embed_dim", "n_embed", "ddconfig")
STAGE_TRAINING = (
    "monitor", "lossconfig", "ckpt_path", "image_key", "ignore_keys", "batch_resize_range", "scheduler_config",
    "lr_g_factor", "use_ema", "ema_decay", "learn_logvar",
)  # fmt: skip
DDCONFIG_READ = ("in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "z_channels")
DDCONFIG_TRAINING = ("resolution", "dropout", "double_z")
CLIP_KEYS = ("version", "arch", "device", "max_length", "freeze", "layer", "layer_idx")
BERT_KEYS = ("n_embed", "n_layer", "vocab_size", "max_seq_len", "device", "use_tokenizer", "embedding_dropout")

# Keys that change the arithmetic, with the values that leave it as it is here.
MODEL_FIXED: Mapping[str, tuple[Any, ...]] = {
    "given_betas": (None,),
    "cosine_s": (0.008,),  # of the cosine schedule, which is refused
    "v_posterior": (0, 0.0),
    "use_positional_encodings": (False,),
    "split_input_params": (None,),
    "cond_stage_forward": (None,),
    "personalization_config": (None,),
}
UNET_FIXED: Mapping[str, tuple[Any, ...]] = {
    "dims": (2,),
    "conv_resample": (True,),
    "num_classes": (None,),
    "n_embed": (None,),
    "disable_self_attentions": (None,),
    "num_attention_blocks": (None,),
    "disable_middle_self_attn": (False,),
    "adm_in_channels": (None,),
    "spatial_transformer_attn_type": ("softmax", "softmax-xformers"),
}
STAGE_FIXED: Mapping[str, tuple[Any, ...]] = {
    "remap": (None,),
    "sane_index_shape": (False,),
    "colorize_nlabels": (None,),
}
DDCONFIG_FIXED: Mapping[str, tuple[Any, ...]] = {
    "attn_resolutions": ([],),
    "resamp_with_conv": (True,),
    "tanh_out": (False,),
    "give_pre_end": (False,),
    "use_linear_attn": (False,),
    "attn_type": ("vanilla", "vanilla-xformers"),
}
# Classes by the last part of their path, since forks have them in other modules.
TARGETS: Mapping[str, tuple[str, ...]] = {
    "model": ("LatentDiffusion", "LatentInpaintDiffusion"),
    "unet_config": ("UNetModel",),
    "first_stage_config": ("AutoencoderKL", "VQModelInterface"),
    "cond_stage_config": ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder", "BERTEmbedder"),
}
INPAINTING_KEYS = ("hybrid",)  # `conditioning_key` of the UNets that read a mask and the masked picture
TEXT_KEYS = (None, "crossattn")


def check_keys(config: OriginalConfig, inpaints: bool) -> None:
    """ModelError for the first key that is not known, or has a value that is not computed here."""
    _check_targets(config)
    _check_section(config, "model.params", config.model, (*MODEL_READ, *MODEL_TRAINING), MODEL_FIXED)
    _check_section(config, "unet_config.params", config.params("unet_config"), (*UNET_READ, *UNET_TRAINING), UNET_FIXED)
    stage = config.params("first_stage_config")
    _check_section(config, "first_stage_config.params", stage, (*STAGE_READ, *STAGE_TRAINING), STAGE_FIXED)
    _check_section(config, "ddconfig", config.ddconfig, (*DDCONFIG_READ, *DDCONFIG_TRAINING), DDCONFIG_FIXED)
    text = BERT_KEYS if _get_class(config.model.get("cond_stage_config")) == "BERTEmbedder" else CLIP_KEYS
    _check_section(config, "cond_stage_config.params", config.params("cond_stage_config"), text, {})
    conditioning = config.model.get("conditioning_key")
    if conditioning not in (INPAINTING_KEYS if inpaints else TEXT_KEYS):
        raise _make_error(config, "model.params", "conditioning_key", conditioning, "crossattn, or null without text")


def _check_targets(config: OriginalConfig) -> None:
    sections = {"model": {"target": config.target}, **{name: config.model.get(name) for name in list(TARGETS)[1:]}}
    for name, section in sections.items():
        target = _get_class(section)
        if target is not None and target not in TARGETS[name]:
            expected = " or ".join(TARGETS[name])
            raise _make_error(config, name, "target", section["target"], f"a class {expected}")  # type: ignore[index]


def _get_class(section: object) -> str | None:
    target = section.get("target") if isinstance(section, Mapping) else None
    return None if target is None else str(target).rpartition(".")[2]


def _check_section(
    config: OriginalConfig,
    name: str,
    section: Mapping[str, Any],
    known: Collection[str],
    fixed: Mapping[str, tuple[Any, ...]],
) -> None:
    for key, value in section.items():
        if key in fixed:
            if not any(type(value) is type(plain) and value == plain for plain in (*fixed[key], None)):
                raise _make_error(config, name, key, value, " or ".join(map(repr, fixed[key])))
        elif key not in known:
            expected = "no such key: it may change what the model computes; take it out if it does not"
            raise _make_error(config, name, key, value, expected)


def _make_error(config: OriginalConfig, section: str, key: object, value: object, expected: str) -> ModelError:
    return ModelError(f"{config.path}: `{section}` `{key!s:.60}`: got {reprlib.repr(value)}, expected {expected}")
