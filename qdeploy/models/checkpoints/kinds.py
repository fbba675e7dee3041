"""Detect which original model a checkpoint holds by its tensors' names, and which of them belong to which part."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from qdeploy.base.errors import ModelError, join_names
from qdeploy.models.checkpoints.foreign import SUPPORTED, refuse_foreign
from qdeploy.models.checkpoints.original_config import OriginalConfig

SD1, SD2, SDXL, UNCONDITIONAL, TEXT2IMG = "sd1", "sd2", "sdxl", "ldm-uncond", "ldm-text2img"

UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
COND_STAGE = "cond_stage_model."
CONDITIONERS = ("conditioner.embedders.0.", "conditioner.embedders.1.")  # Stable Diffusion XL's text encoders
EMA = "model_ema."  # LitEma's copy of the UNet, its names without dots

CLIP_TOKENS = re.compile(r"cond_stage_model\.transformer\.(text_model\.)?embeddings\.token_embedding\.weight")
OPEN_CLIP_TOKENS = "cond_stage_model.model.token_embedding.weight"
BERT_TOKENS = "cond_stage_model.transformer.token_emb.weight"
# The class of each kind's text encoder in its YAML.
EMBEDDERS = {SD1: "FrozenCLIPEmbedder", SD2: "FrozenOpenCLIPEmbedder", TEXT2IMG: "BERTEmbedder"}
# Not weights of a part: schedule buffers, losses and discriminators, position indices, LitEma's own counters.
EXTRAS = re.compile(
    r"(betas|v_pred|ztsnr|logvar|lvlb_weights|scale_factor|cond_ids|(log_one_minus_|sqrt_(recip(m1)?_|one_minus_)?)?alphas_cumprod"
    r"(_prev)?|posterior_\w+|loss\..*|model_ema\.(decay|num_updates)|first_stage_model\.(loss\..*|colorize)"
    r"|first_stage_model\.model_ema\..*|cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids"
    r"|cond_stage_model\.(model\.)?(logit_scale|text_projection)|cond_stage_model\.model\.attn_mask|global_step"
    r"|conditioner\.embedders\.0\.transformer\.(text_model\.)?embeddings\.position_ids"
    r"|conditioner\.embedders\.0\.(logit_scale|text_projection)"
    r"|conditioner\.embedders\.1\.model\.(logit_scale|attn_mask)|denoiser\.sigmas)"
)


def detect_kind(tensors: Mapping[str, Tensor], config: OriginalConfig | None = None) -> str:
    """``sd1``, ``sd2``, ``sdxl``, ``ldm-uncond`` or ``ldm-text2img``.

    ModelError for layouts that are not converted, for tensors that belong to no part, and where the YAML
    says otherwise.
    """
    refuse_foreign(tensors)
    for part, what in ((UNET, "UNet"), (FIRST_STAGE, "first stage")):
        if not any(name.startswith(part) for name in tensors):
            raise ModelError(f"the file has no {what} (no tensor `{part}…`); {SUPPORTED}")
    _check_parts(tensors)
    kind = _detect_text_kind(tensors)
    if config is not None:
        _check_target(kind, config)
    return kind


def select_part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it and without known extras."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not EXTRAS.fullmatch(name)
    }


def has_ema(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the file holds averaged weights of the UNet next to the last ones (Lightning's ``model_ema.…``)."""
    return bool(select_part(tensors, EMA))


def swap_in_ema(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same file with the UNet's averaged weights in place of the last ones; ModelError where it has none."""
    if not has_ema(tensors):
        raise ModelError("the file has no averaged weights (`model_ema.…`); convert it without EMA")
    swapped = dict(tensors)
    for name in tensors:
        if name.startswith(UNET):
            short = EMA + name.removeprefix("model.").replace(".", "")
            if short not in tensors or tensors[short].shape != tensors[name].shape:
                raise ModelError(f"the file's averaged weights lack a fitting `{short}`; convert it without EMA")
            swapped[name] = tensors[short]
    return swapped


def _check_parts(tensors: Mapping[str, Tensor]) -> None:
    known = (UNET, FIRST_STAGE, COND_STAGE, EMA, *CONDITIONERS)
    unknown = [name for name in tensors if not name.startswith(known) and not EXTRAS.fullmatch(name)]
    if unknown:
        raise ModelError(f"{len(unknown)} tensors belong to no known part: {join_names(unknown)}; {SUPPORTED}")


def _detect_text_kind(tensors: Mapping[str, Tensor]) -> str:
    if any(name.startswith(CONDITIONERS) for name in tensors):
        missing = [part for part in CONDITIONERS if not select_part(tensors, part)]
        if missing:
            raise ModelError(
                f"the file has one of Stable Diffusion XL's two text encoders and no tensor `{missing[0]}…`; give a "
                "file with both in it, as the published one is"
            )
        return SDXL
    has_cross_attention = any(name.startswith(UNET) and ".attn2." in name for name in tensors)
    encoder = select_part(tensors, COND_STAGE)
    if not has_cross_attention and not encoder:
        return UNCONDITIONAL
    if has_cross_attention and any(CLIP_TOKENS.fullmatch(name) for name in tensors):
        return SD1
    if has_cross_attention and OPEN_CLIP_TOKENS in tensors:
        return SD2
    if has_cross_attention and BERT_TOKENS in tensors:
        return TEXT2IMG
    if has_cross_attention and not encoder:
        raise ModelError(f"the file has a UNet with cross-attention but no text encoder (`{COND_STAGE}…`); {SUPPORTED}")
    raise ModelError(f"the file's conditioning is not text: {join_names(list(encoder))}; {SUPPORTED}")


def _check_target(kind: str, config: OriginalConfig) -> None:
    stage = config.model.get("cond_stage_config")
    unconditional = stage is None or isinstance(stage, str)
    if unconditional != (kind == UNCONDITIONAL):
        raise ModelError(f"{config.path} describes another kind of model than the weights, which are {kind}")
    target = stage.get("target") if isinstance(stage, Mapping) else None
    embedder = None if target is None else str(target).rpartition(".")[2]
    if embedder in EMBEDDERS.values() and embedder != EMBEDDERS.get(kind):
        raise ModelError(
            f"{config.path}: `cond_stage_config` `target`: got {str(target)[:100]!r}, and the weights are those of a "
            f"{EMBEDDERS.get(kind)}; give the YAML that the file was published with"
        )
