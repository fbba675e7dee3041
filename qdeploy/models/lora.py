"""LoRA files fused into a model's weights: W + scale * alpha / rank * up @ down (Hu et al. 2021, arXiv:2106.09685).

Layouts: diffusers' and PEFT's (``unet.….to_q.lora_A.weight``, and the older ``….processor.to_q_lora.down.weight``)
and kohya's (``lora_unet_…_to_q.lora_down.weight`` with ``.alpha``, ``lora_te_…``; LoCon's convolutions too).
Safetensors only, or the folder that PEFT saved; ``peft`` is not needed. Strengths are in ``lora_settings.py``.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.artifacts.components import UNET, get_kind
from qdeploy.base.documents import parse_json
from qdeploy.base.errors import ModelError, join_names
from qdeploy.base.files import hash_file
from qdeploy.models.config_files import read_config
from qdeploy.models.half_weights import set_weight
from qdeploy.models.latent_diffusion import LatentDiffusion
from qdeploy.models.lora_settings import CONFIG_FILE, LoraSettings, find_lora_file, settings_from_config
from qdeploy.models.options import LoraFile
from qdeploy.models.original_names import find_original_name
from qdeploy.models.rewrites.surgery import copy_module
from qdeploy.models.weight_files import check_safetensors

PREFIXES = {UNET.name: ("unet.", ""), "text_encoder": ("text_encoder.", ""), "text_encoder_2": ("text_encoder_2.",)}
KOHYA_PREFIXES = {
    UNET.name: ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),  # the second where the model has several
    "text_encoder_2": ("lora_te2_",),
}
OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
OTHER_METHODS = ("hada_", "lokr_", "lora_mid", "lora_magnitude_vector", "dora_scale", "oft_", ".diff", ".bias")
METADATA = "lora_adapter_metadata"  # diffusers' copy of PEFT's LoraConfig, names prefixed by the component

ALPHA_TYPES = (torch.int16, torch.int32, torch.int64)  # in which some trainers store a whole alpha
MAX_KEYS = 100_000
DIFFUSERS_STEM = "pytorch_lora_weights"
COMPONENTS = tuple(full for full, *_ in PREFIXES.values())  # with which diffusers begins every key
WRAPPED = "base_model.model."  # how PEFT's own files begin
KEY = re.compile(
    r"(?P<layer>.+?)"
    r"(?:(?P<down>(?:\.lora_A(?:\.[\w-]+)?|\.lora_down|\.lora_linear_layer\.down|[._]lora\.down)\.weight)"
    r"|(?P<up>(?:\.lora_B(?:\.[\w-]+)?|\.lora_up|\.lora_linear_layer\.up|[._]lora\.up)\.weight)"
    r"|(?P<alpha>(?:_lora)?\.alpha))"
)


@dataclass(frozen=True)
class LayerAddress:
    """A Conv2d or Linear of the model: its component, and its name below the component's ``inner``."""

    component: str
    layer: str


@dataclass(frozen=True)
class LowRankUpdate:
    """One layer's update.

    down: ``float32[r, in]`` or ``[r, in, k, k]``.
    up: ``float32[out, r]`` or ``[out, r, 1, 1]``.
    strength: alpha / r.
    """

    down: Tensor
    up: Tensor
    strength: float

    def delta(self, shape: torch.Size) -> Tensor | None:
        """``strength * up @ down`` in the ``shape`` of the layer's weight; None where it does not fit."""
        rank = self.down.shape[0]
        fits = (
            self.down.dim() in (2, 4)
            and self.down.shape[1] == shape[1]
            and self.down[0].numel() == math.prod(shape[1:])
            and self.up.numel() == shape[0] * rank
            and self.up.shape[:2] == (shape[0], rank)
        )
        return self.strength * (self.up.flatten(1) @ self.down.flatten(1)).view(shape) if fits else None


@dataclass(frozen=True)
class LoraFileContent:
    """What one LoRA file holds, and the settings in its header and next to it.

    used: the files that it was read from, the weights first.
    """

    file: Path
    tensors: Mapping[str, Tensor]
    header: Mapping[str, Any]
    config: LoraSettings | None
    used: tuple[Path, ...]

    def find_settings(self, component: str) -> LoraSettings:
        """Of the header where it speaks of ``component``, else of the config next to the file."""
        prefix = f"{component}."
        own = {key.removeprefix(prefix): value for key, value in self.header.items() if key.startswith(prefix)}
        if own:
            return settings_from_config(own, f"{self.file}: {METADATA}")
        return LoraSettings(str(self.file)) if self.config is None else self.config


def fuse_lora(model: LatentDiffusion, file: Path, scale: float = 1.0) -> LatentDiffusion:
    """``model`` with the LoRA in ``file``, or in a folder of PEFT's, added to its weights; the original is unchanged.

    The new ``sha256`` depends on both files, the LoRA's settings and the scale. Raises ModelError, naming the keys,
    when ``file`` is not a plain LoRA in safetensors, holds a key that the model has no layer for, or has a layer of
    another shape.
    """
    content = read_lora_file(file)
    updates = match_updates(model, content)
    components = {name: copy_module(model.component(name)) for name in {address.component for address in updates}}
    for address, update in updates.items():
        layer = components[address.component].inner.get_submodule(address.layer)
        add_update(layer, update, scale, f"{content.file}: {address.layer}")
    hashes = " ".join(map(hash_file, content.used))
    digest = hashlib.sha256(f"{model.sha256} lora {hashes} {float(scale)!r}\n".encode()).hexdigest()
    loras = (*model.loras, str(LoraFile(file, scale)))
    return replace(model.with_components(components), sha256=digest, loras=loras)


def add_update(layer: nn.Module, update: LowRankUpdate, scale: float, name: str) -> None:
    """Give ``layer`` a new weight; the tensor it had is left as it is."""
    weight: Any = layer.weight
    delta = update.delta(weight.shape)
    if delta is None:
        raise ModelError(
            f"{name}: got down {list(update.down.shape)} and up {list(update.up.shape)}, which do not make a weight of "
            f"{list(weight.shape)}; the LoRA was made for another model"
        )
    fused = weight + scale * delta
    if not torch.isfinite(fused).all():
        raise ModelError(f"{name}: the fused weight holds NaN or infinity; get the LoRA again or give another scale")
    set_weight(layer, fused)


def match_updates(model: LatentDiffusion, content: LoraFileContent) -> dict[LayerAddress, LowRankUpdate]:
    """The updates by the layers of ``model`` that they are for; every key is used."""
    addresses = list_addresses(model)
    parts_by_address: dict[LayerAddress, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in content.tensors.items():
        match = KEY.fullmatch(key)
        address = None if match is None else addresses.get(match["layer"].replace(WRAPPED, "", 1))
        if match is None or address is None:
            unknown.append(key)
        else:
            assert match.lastgroup is not None  # one of the three roles
            parts_by_address.setdefault(address, {})[match.lastgroup] = read_numbers(content.file, key, tensor)
    check_keys(model, content.file, list(content.tensors), unknown)
    if sum(map(len, parts_by_address.values())) != len(content.tensors):
        raise ModelError(
            f"{content.file} names a layer twice, in two layouts or for two adapters; it cannot be said which is "
            "meant; give a file with one of them"
        )
    return {address: build_update(content, address, parts) for address, parts in parts_by_address.items()}


def build_update(content: LoraFileContent, address: LayerAddress, parts: Mapping[str, Tensor]) -> LowRankUpdate:
    """One layer's tensors, checked to be whole; without an alpha of its own the settings', else the rank."""
    missing = [role for role in ("down", "up") if role not in parts]
    if missing:
        raise ModelError(
            f"{content.file}: {address.layer} has no {' and no '.join(missing)} weight; get the LoRA again"
        )
    rank = parts["down"].shape[0] if parts["down"].dim() else 0
    if rank == 0 or parts["up"].dim() < 2 or ("alpha" in parts and parts["alpha"].numel() != 1):
        raise ModelError(f"{content.file}: {address.layer} is malformed; get the LoRA again")
    if "alpha" in parts:
        return LowRankUpdate(parts["down"], parts["up"], parts["alpha"].item() / rank)
    names = list_spellings(address.component, address.layer)
    return LowRankUpdate(
        parts["down"], parts["up"], content.find_settings(address.component).compute_strength(names, rank)
    )


def read_numbers(file: Path, key: str, tensor: Tensor) -> Tensor:
    """``float32`` of a tensor of real numbers; ModelError for complex and other ones."""
    if not tensor.is_floating_point() and not (key.endswith("alpha") and tensor.dtype in ALPHA_TYPES):
        raise ModelError(f"{file}: {key} has type {tensor.dtype}, expected real numbers; get the LoRA again")
    return tensor.float()


def read_lora_file(path: Path) -> LoraFileContent:
    """The LoRA in the file or folder ``path``, with PEFT's settings where there are any."""
    file = find_lora_file(path)
    tensors, header = read_safetensors(file)
    config_file = file.with_name(CONFIG_FILE)
    config = None
    if is_saved_by_peft(file, tensors) and not header and os.path.lexists(config_file):
        config = settings_from_config(read_config(config_file), str(config_file))
    elif not header and any(key.startswith(WRAPPED) for key in tensors):
        raise ModelError(
            f"{file} was saved by PEFT and there is no {CONFIG_FILE} next to it, which says how strong it "
            "is (lora_alpha, use_rslora); put it there"
        )
    return LoraFileContent(file, tensors, header, config, (file,) if config is None else (file, config_file))


def is_saved_by_peft(file: Path, keys: Iterable[str]) -> bool:
    """Whether a file has PEFT's keys, and is not diffusers' own, by name and keys, in which alpha is the rank."""
    names = list(keys)
    by_component = file.name.startswith(DIFFUSERS_STEM) and all(name.startswith(COMPONENTS) for name in names)
    return any(".lora_A" in name for name in names) and not by_component


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The tensors of a LoRA file, and PEFT's settings where diffusers wrote them."""
    from safetensors import SafetensorError, safe_open

    try:
        check_safetensors(file, "get the LoRA again")
        with safe_open(file, framework="pt") as tensors_file:
            text = (tensors_file.metadata() or {}).get(METADATA) or "{}"
            metadata = parse_json(text.encode(), f"its metadata {METADATA}", dict[str, Any], error=ModelError)
            keys = list(tensors_file.keys())
            if len(keys) > MAX_KEYS:
                raise ValueError(f"{len(keys)} tensors, expected at most {MAX_KEYS}")
            tensors = {key: tensors_file.get_tensor(key) for key in keys}
    except (ModelError, SafetensorError, ValueError, OSError) as exc:
        raise ModelError(
            f"{file} cannot be read as a LoRA in safetensors ({exc}); give such a file, other formats may run code"
        ) from exc
    if not tensors:
        raise ModelError(f"{file} holds no tensors; give a LoRA")
    if not isinstance(metadata, dict):
        raise ModelError(f"{file}: its {METADATA} is {reprlib.repr(metadata)}, expected an object; get the LoRA again")
    return tensors, metadata


def check_keys(model: LatentDiffusion, file: Path, keys: list[str], unknown: list[str]) -> None:
    """ModelError when a key has no layer, or is of another method than LoRA."""
    other = [key for key in keys if any(mark in key for mark in OTHER_METHODS)]
    if other:
        raise ModelError(
            f"{file} is not a plain LoRA: it holds {join_names(other)}; LoHa, LoKr, DoRA, OFT, biases and full "
            "differences are not supported"
        )
    if unknown:
        raise ModelError(
            f"{file}: {len(unknown)} of {len(keys)} keys are for no layer of {model.source}: {join_names(unknown)}; "
            "give a LoRA that was made for this model"
        )


def list_addresses(model: LatentDiffusion) -> dict[str, LayerAddress]:
    """Every name that a LoRA file may give to a layer of ``model``."""
    return {
        spelling: LayerAddress(component, layer)
        for component in PREFIXES
        if component in model.components
        for layer, module in model.component(component).inner.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        for name in (*list_spellings(component, layer), *list_original_names(model, component, layer))
        for spelling in add_prefixes(component, name)
    }


def list_original_names(model: LatentDiffusion, component: str, layer: str) -> list[str]:
    """The name that a UNet's layer has in the original layout."""
    if not get_kind(component).in_loop or not model.reads_text:
        return []
    name = find_original_name(layer, model.unet.inner.config)
    return [] if name is None else [name]


def list_spellings(component: str, layer: str) -> Iterator[str]:
    """The layer's name, and what older libraries called it."""
    yield layer
    if get_kind(component).in_loop:
        yield re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1", layer)
        return
    parent, _, leaf = layer.rpartition(".")
    old = f"{parent}.{OLD_ATTENTION.get(leaf, leaf)}"
    yield from (old, f"text_model.{layer}", f"text_model.{old}")


def add_prefixes(component: str, name: str) -> Iterator[str]:
    """``name`` as diffusers and as kohya write it."""
    yield from (prefix + name for prefix in PREFIXES[component])
    yield from (prefix + name.replace(".", "_") for prefix in KOHYA_PREFIXES[component])
