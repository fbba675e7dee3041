"""Lines for `inspect` on what a folder's modules and texts are read as, where no setting of a file says it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qdeploy.base.tokens import list_expansions
from qdeploy.models.config_files import read_config
from qdeploy.models.latent_diffusion import ModelParts, is_vq
from qdeploy.models.weight_files import SUFFIX, choose_variant

MODULE_STEM, TEXT_STEM = "diffusion_pytorch_model", "model"
# What text encoders were saved with, and do not compute with: indices, and the parts of CLIP that see pictures.
UNUSED_TEXT_WEIGHT = re.compile(
    r"(.*\.)?position_ids|(.*\.)?(text_projection|visual_projection)\.\w+|(.*\.)?logit_scale|(.*\.)?vision_model\..*"
)
TEXT_LAYER = re.compile(r"(?:.*\.)?encoder\.layers\.(\d{1,4})\..*")
OLD_ATTENTION = re.compile(r".*\.(query|key|value|proj_attn)\.(weight|bias)")  # of diffusers before 0.12


def list_notes(folder: Path, vae_folder: str, text_folders: Sequence[str], parts: ModelParts) -> tuple[str, ...]:
    """All of them for the model in ``folder``, in the order of the reference's table."""
    modules = ("unet", vae_folder)
    stems = dict.fromkeys(modules, MODULE_STEM) | dict.fromkeys(text_folders, TEXT_STEM)
    return (
        *_note_attention(folder, modules),
        *_note_scaling_factor(folder / vae_folder, parts.vae),
        *_note_variants(folder, stems),
        *_note_text_layers(folder, text_folders, parts),
        *_note_guidance(parts.unet),
        *_note_expansions({name: text.tokenizer for name, text in parts.text.items()}),
    )


def _note_attention(folder: Path, modules: Iterable[str]) -> Iterator[str]:
    for part in modules:
        files = [path for path in (folder / part).glob(f"{MODULE_STEM}*{SUFFIX}") if path.is_file()]
        if any(OLD_ATTENTION.fullmatch(name) for path in files for name in _read_names(path)):
            yield f"{part}: attention named `query`, `proj_attn` -> `to_q`, `to_out.0`, as diffusers renames it"


def _note_variants(folder: Path, stems: Mapping[str, str]) -> Iterator[str]:
    for part, stem in stems.items():
        variant = choose_variant(folder / part, stem)
        if variant is not None:
            yield f"{part}: the weights' variant {variant!r:.40} -> float32, since there is no {stem}{SUFFIX}"


def _read_names(path: Path) -> list[str]:
    with safe_open(path, framework="numpy") as file:
        return list(file.keys())


def _note_scaling_factor(folder: Path, vae: Any) -> Iterator[str]:
    if is_vq(vae) and "scaling_factor" not in read_config(folder / "config.json"):
        yield f"{folder.name}/config.json `scaling_factor`: missing -> 1, as CompVis trained VQ models"


def is_unused_text_weight(name: str, layers: int | None) -> bool:
    """Whether a text encoder of ``layers`` leaves this weight out: none of its own, or of a later layer (clip skip)."""
    match = TEXT_LAYER.fullmatch(name)
    is_later = match is not None and layers is not None and int(match[1]) >= layers
    return is_later or bool(UNUSED_TEXT_WEIGHT.fullmatch(name))


def _note_text_layers(folder: Path, text_folders: Iterable[str], parts: ModelParts) -> Iterator[str]:
    for part, text in zip(text_folders, parts.text.values(), strict=True):
        layers = getattr(text.encoder.config, "num_hidden_layers", None)
        names = [name for path in (folder / part).glob(f"{TEXT_STEM}*{SUFFIX}") for name in _read_names(path)]
        stored = 1 + max((int(match[1]) for name in names if (match := TEXT_LAYER.fullmatch(name))), default=-1)
        if layers is not None and stored > layers:
            yield f"{part}/config.json `num_hidden_layers` {layers}: of the {stored} layers that the weights have"


def _note_guidance(unet: Any) -> Iterator[str]:
    channels = getattr(unet.config, "time_cond_proj_dim", None)
    if channels is not None:
        yield (
            f"unet/config.json `time_cond_proj_dim` {channels}: the guidance scale is fed as an embedding, and the "
            "UNet runs once a step, without classifier-free guidance"
        )


def _note_expansions(tokenizers: Mapping[str, Any]) -> Iterator[str]:
    for name, tokenizer in tokenizers.items():
        for token, expansion in list_expansions(tokenizer.added_tokens_encoder).items():
            yield f"{name}: the token {token!r:.60} stands for its {len(expansion.split())} vectors"
