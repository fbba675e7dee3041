"""The original text encoders: CLIP and OpenCLIP as transformers' ``CLIPTextModel``, BERT as ``LDMBertModel``."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from torch import Tensor, nn

from qdeploy.base.errors import ModelError
from qdeploy.models.checkpoints.assemble import build_module, merge_names
from qdeploy.models.checkpoints.kinds import COND_STAGE, CONDITIONERS, SD1, SD2, SDXL, TEXT2IMG, UNCONDITIONAL
from qdeploy.models.checkpoints.open_clip import PROJECTION, rename_open_clip
from qdeploy.models.checkpoints.original_config import OriginalConfig

LEVEL = re.compile(r"^(transformer\.)?text_model\.")
CLIP_HEAD_CHANNELS = 64  # of every CLIP text encoder
BERT_HEADS, BERT_HEAD_CHANNELS = 8, 64  # x-transformers' defaults, which `BERTEmbedder` has no setting for
BERT_NAMES = (  # LDMBert's names; a layer is two of the original's, attention and feed-forward
    (r"token_emb\.", "model.embed_tokens."),
    (r"pos_emb\.emb\.", "model.embed_positions."),
    (r"norm\.", "model.layer_norm."),
    (r"attn_layers\.layers\.(\d*[02468])\.0\.", "model.layers.{}.self_attn_layer_norm."),
    (r"attn_layers\.layers\.(\d*[02468])\.1\.to_([qkv])\.", "model.layers.{}.self_attn.{}_proj."),
    (r"attn_layers\.layers\.(\d*[02468])\.1\.to_out\.", "model.layers.{}.self_attn.out_proj."),
    (r"attn_layers\.layers\.(\d*[13579])\.0\.", "model.layers.{}.final_layer_norm."),
    (r"attn_layers\.layers\.(\d*[13579])\.1\.net\.0\.0\.", "model.layers.{}.fc1."),
    (r"attn_layers\.layers\.(\d*[13579])\.1\.net\.2\.", "model.layers.{}.fc2."),
)


def convert_clip(weights: Mapping[str, Tensor], config: OriginalConfig | None = None) -> nn.Module:
    """``FrozenCLIPEmbedder``'s transformer, from its names below ``cond_stage_model.``.

    A YAML that takes an earlier layer (clip skip) gets a model that ends with it. transformers 5 has no ``text_model``
    level in ``CLIPTextModel`` any more, and position indices are not stored.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint

    _check_prefix(weights, "transformer.")
    named = convert_ldm_clip_checkpoint({f"cond_stage_model.{name}": value for name, value in weights.items()})
    named = drop_level(named)
    stated = count_layers(named)
    return _build_clip(named, stated if config is None else choose_layers(config, stated), "quick_gelu", config)


def convert_open_clip(weights: Mapping[str, Tensor], config: OriginalConfig | None = None) -> nn.Module:
    """``FrozenOpenCLIPEmbedder``'s model, from its names below ``cond_stage_model.``.

    Stable Diffusion 2 was trained on its last layer but one, which its published YAMLs say; without a YAML that is
    where the model ends.
    """
    _check_prefix(weights, "model.")
    named = rename_open_clip({name.removeprefix("model."): value for name, value in weights.items()})
    stated = count_layers(named)
    return _build_clip(named, stated - 1 if config is None else choose_layers(config, stated), "gelu", config)


def _check_prefix(weights: Mapping[str, Tensor], prefix: str) -> None:
    foreign = [name for name in weights if not name.startswith(prefix)]
    if foreign:
        raise ModelError(f"the text encoder has weights outside its transformer: `{foreign[0]}`")


def convert_pooled_open_clip(weights: Mapping[str, Tensor], config: OriginalConfig | None = None) -> nn.Module:
    """``FrozenOpenCLIPEmbedder2``'s model as ``CLIPTextModelWithProjection``, from its names below the embedder's."""
    from transformers import CLIPTextModelWithProjection

    _check_prefix(weights, "model.")
    named = rename_open_clip({name.removeprefix("model."): value for name, value in weights.items()})
    clip_config = _read_clip_config(named, count_layers(named), "gelu")
    clip_config.projection_dim = named[PROJECTION].shape[0]
    nested = {name if name == PROJECTION else f"text_model.{name}": value for name, value in named.items()}
    return build_module(CLIPTextModelWithProjection, clip_config, nested, "second text encoder")


def count_layers(named: Mapping[str, Tensor]) -> int:
    """Layers of a CLIP text encoder under transformers' names."""
    return _count_layers(named, "encoder.layers.{}.mlp.fc1.weight")


def _build_clip(named: Mapping[str, Tensor], layers: int, hidden_act: str, config: OriginalConfig | None) -> nn.Module:
    """``CLIPTextModel`` of the first ``layers``, from weights under transformers' names."""
    from transformers import CLIPTextModel

    named = {name: value for name, value in named.items() if _get_layer(name) < layers}
    clip_config = _read_clip_config(named, layers, hidden_act)
    if config is not None:
        config.check(config.params("cond_stage_config"), {"max_length": clip_config.max_position_embeddings})
    return build_module(CLIPTextModel, clip_config, named, "text encoder")


def _read_clip_config(named: Mapping[str, Tensor], layers: int, hidden_act: str) -> Any:
    """``CLIPTextConfig`` by the weights' shapes."""
    vocab_size, width = named["embeddings.token_embedding.weight"].shape
    return build_clip_config(
        vocab_size,
        width,
        inner=named["encoder.layers.0.mlp.fc1.weight"].shape[0],
        layers=layers,
        positions=named["embeddings.position_embedding.weight"].shape[0],
        hidden_act=hidden_act,
    )


def choose_layers(config: OriginalConfig, layers: int) -> int:
    """How many of the ``layers`` the YAML's text encoder runs before its final norm.

    `layer: hidden` with `layer_idx: -2` and `penultimate` are clip skip as diffusers, web UIs and the models that
    were trained with it compute it: the output of the last layer but one, through the final norm.
    """
    params = config.params("cond_stage_config")
    layer, index = params.get("layer", "last"), config.integer("layer_idx", params, low=-layers, high=layers)
    if layer == "last" or layer is None:
        return layers
    if layer == "penultimate":
        index = -2
    elif layer != "hidden" or index is None or index == 0:
        raise ModelError(
            f"{config.path}: `cond_stage_config` `layer` is {reprlib.repr(layer)} with `layer_idx` {index}, expected "
            f"last, penultimate, or hidden with a layer_idx from {-layers} to {layers} but 0"
        )
    assert index is not None
    return index if index > 0 else layers + 1 + index


def drop_level(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the level ``text_model``, which files have by the version of transformers that saved them."""
    return merge_names(((name, LEVEL.sub(r"\1", name), tensor) for name, tensor in weights.items()), "text encoder")


def describe_layers(weights: Mapping[str, Tensor], config: OriginalConfig) -> tuple[str, ...]:
    """A line where the YAML takes an earlier layer of the text encoder, or its output before the final norm."""
    layer = config.params("cond_stage_config").get("layer", "last")
    if layer in ("last", None):
        return ()
    numbers = [int(match[1]) for name in weights if (match := re.search(r"\bencoder\.layers\.(\d{1,4})\.", name))]
    stated = 1 + max(numbers, default=-1)
    return (
        f"{config.path.name} `cond_stage_config` `layer` {layer!r:.40}: the output of layer "
        f"{choose_layers(config, stated)} of {stated}, through the final norm, as clip skip of diffusers and web UIs",
    )


def _get_layer(name: str) -> int:
    """The number of the layer that the weight belongs to; -1 for those that every model has."""
    match = re.match(r"encoder\.layers\.(\d+)\.", name)
    return -1 if match is None else int(match[1])


def build_clip_config(
    vocab_size: int, width: int, inner: int, layers: int, positions: int, hidden_act: str = "quick_gelu"
) -> Any:
    """``CLIPTextConfig`` of a text encoder with ``inner`` channels between the linear layers of a block."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // CLIP_HEAD_CHANNELS,
        max_position_embeddings=positions,
        hidden_act=hidden_act,
        projection_dim=width,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
    )


def convert_bert(weights: Mapping[str, Tensor], _: OriginalConfig | None = None) -> nn.Module:
    """``BERTEmbedder``'s ``TransformerWrapper``, from its names below ``cond_stage_model.``."""
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    named = {_rename_bert(name.removeprefix("transformer.")): value for name, value in weights.items()}
    vocab_size, width = named["model.embed_tokens.weight"].shape
    inner = named["model.layers.0.self_attn.q_proj.weight"].shape[0]
    if inner != BERT_HEADS * BERT_HEAD_CHANNELS:
        raise ModelError(
            f"the text encoder's attention has {inner} channels, expected {BERT_HEADS} heads of {BERT_HEAD_CHANNELS}"
        )
    config = LDMBertConfig(
        vocab_size=vocab_size,
        max_position_embeddings=named["model.embed_positions.weight"].shape[0],
        encoder_layers=_count_layers(named, "model.layers.{}.fc1.weight"),
        encoder_ffn_dim=named["model.layers.0.fc1.weight"].shape[0],
        encoder_attention_heads=BERT_HEADS,
        head_dim=BERT_HEAD_CHANNELS,
        d_model=width,
    )
    return build_module(LDMBertModel, config, named, "text encoder")


def check_bert_config(weights: Mapping[str, Tensor], config: OriginalConfig) -> None:
    """ModelError where the YAML's text encoder is not the one that the tensors show."""
    sizes: dict[str, Any] = {
        "n_embed": weights["transformer.token_emb.weight"].shape[1],
        "n_layer": _count_layers(weights, "transformer.attn_layers.layers.{}.0.weight") // 2,
        "vocab_size": weights["transformer.token_emb.weight"].shape[0],
        "max_seq_len": weights["transformer.pos_emb.emb.weight"].shape[0],
    }
    config.check(config.params("cond_stage_config"), sizes)


def _rename_bert(name: str) -> str:
    for pattern, replacement in BERT_NAMES:
        match = re.match(pattern, name)
        if match:
            layer, *rest = [*match.groups(), "0"] if not match.groups() else match.groups()
            return replacement.format(int(layer) // 2, *rest) + name[match.end() :]
    return name


def _count_layers(weights: Mapping[str, Tensor], pattern: str) -> int:
    return next(i for i in count() if pattern.format(i) not in weights)


Convert = Callable[[Mapping[str, Tensor], OriginalConfig | None], nn.Module]
# The text encoders of each kind of checkpoint: where their weights are, and how they are converted.
ENCODERS: Mapping[str, tuple[tuple[str, Convert], ...]] = {
    SD1: ((COND_STAGE, convert_clip),),
    SD2: ((COND_STAGE, convert_open_clip),),
    SDXL: tuple(zip(CONDITIONERS, (convert_clip, convert_pooled_open_clip), strict=True)),
    TEXT2IMG: ((COND_STAGE, convert_bert),),
    UNCONDITIONAL: (),
}
