"""LoRA files fused into a model's weights: W + scale * alpha / rank * up @ down (Hu et al. 2021, arXiv:2106.09685).

Layouts: diffusers' and PEFT's (``unet.….to_q.lora_A.weight``, and the older ``….processor.to_q_lora.down.weight``)
and kohya's (``lora_unet_…_to_q.lora_down.weight`` with ``.alpha``, ``lora_te_…``; LoCon's convolutions too).
Safetensors only; ``peft`` is not needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.artifacts.components import TEXT_ENCODER, UNET, get_kind
from qdeploy.base.errors import ModelError, join_names
from qdeploy.base.files import hash_file
from qdeploy.base.names import matches_name
from qdeploy.models.latent_diffusion import LatentDiffusion
from qdeploy.models.options import LoraFile
from qdeploy.models.rewrites.surgery import copy_module

PREFIXES = {UNET.name: ("unet.", ""), TEXT_ENCODER.name: ("text_encoder.",)}
KOHYA_PREFIXES = {UNET.name: "lora_unet_", TEXT_ENCODER.name: "lora_te_"}
OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
OTHER_METHODS = ("hada_", "lokr_", "lora_mid", "lora_magnitude_vector", "dora_scale", "oft_", ".diff", ".bias")
METADATA = "lora_adapter_metadata"  # diffusers' copy of PEFT's LoraConfig, names prefixed by the component

KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<layer>.+?)"
    r"(?:(?P<down>(?:\.lora_A(?:\.default)?|\.lora_down|\.lora_linear_layer\.down|[._]lora\.down)\.weight)"
    r"|(?P<up>(?:\.lora_B(?:\.default)?|\.lora_up|\.lora_linear_layer\.up|[._]lora\.up)\.weight)"
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


def fuse_lora(model: LatentDiffusion, file: Path, scale: float = 1.0) -> LatentDiffusion:
    """``model`` with the LoRA in ``file`` added to its weights; the original is unchanged.

    The new ``sha256`` depends on both files and the scale. Raises ModelError, naming the keys, when ``file`` is not
    a plain LoRA in safetensors, holds a key that the model has no layer for, or has a layer of another shape.
    """
    updates = read_lora(model, file)
    components = {name: copy_module(model.component(name)) for name in {address.component for address in updates}}
    for address, update in updates.items():
        layer = components[address.component].inner.get_submodule(address.layer)
        add_update(layer, update, scale, f"{file}: {address.layer}")
    digest = hashlib.sha256(f"{model.sha256} lora {hash_file(file)} {float(scale)!r}\n".encode()).hexdigest()
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
    layer.weight = nn.Parameter(fused, requires_grad=False)


def read_lora(model: LatentDiffusion, file: Path) -> dict[LayerAddress, LowRankUpdate]:
    """The updates in ``file`` by the layers of ``model`` that they are for; every key is used."""
    tensors, metadata = read_safetensors(file)
    addresses = list_addresses(model)
    parts_by_address: dict[LayerAddress, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        address = None if match is None else addresses.get(match["layer"])
        if match is None or address is None:
            unknown.append(key)
        else:
            assert match.lastgroup is not None  # one of the three roles
            parts_by_address.setdefault(address, {})[match.lastgroup] = tensor.float()
    check_keys(model, file, list(tensors), unknown)
    if sum(map(len, parts_by_address.values())) != len(tensors):
        raise ModelError(f"{file} names a layer twice, in two layouts; it cannot be said which is meant")
    try:
        return {address: build_update(file, address, parts, metadata) for address, parts in parts_by_address.items()}
    except (TypeError, ValueError, AttributeError) as exc:
        raise ModelError(f"{file}: its {METADATA} cannot be understood ({exc}); get the LoRA again") from exc


def build_update(
    file: Path, address: LayerAddress, parts: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> LowRankUpdate:
    """One layer's tensors, checked to be whole; without an alpha of its own the metadata's, else the rank."""
    missing = [role for role in ("down", "up") if role not in parts]
    if missing:
        raise ModelError(f"{file}: {address.layer} has no {' and no '.join(missing)} weight; get the LoRA again")
    rank = parts["down"].shape[0] if parts["down"].dim() else 0
    if rank == 0 or parts["up"].dim() < 2 or ("alpha" in parts and parts["alpha"].numel() != 1):
        raise ModelError(f"{file}: {address.layer} is malformed; get the LoRA again")
    alpha = parts["alpha"].item() if "alpha" in parts else read_alpha(metadata, address, rank)
    return LowRankUpdate(parts["down"], parts["up"], alpha / rank)


def read_alpha(metadata: Mapping[str, Any], address: LayerAddress, rank: int) -> float:
    """Alpha by PEFT's LoraConfig: the layer's own in ``alpha_pattern``, else ``lora_alpha``; the rank without either.

    rsLoRA divides by the root of the rank instead (Kalajdzievski 2023, arXiv:2312.03732).
    """
    own = {key.removeprefix(f"{address.component}."): value for key, value in metadata.items()}
    pattern = own.get("alpha_pattern") or {}
    chosen = [value for tail, value in pattern.items() if matches_name(address.layer, (tail,))]
    alpha = float([*chosen, own.get("lora_alpha", rank)][0])
    return alpha * math.sqrt(rank) if own.get("use_rslora") else alpha


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The tensors of a LoRA file, and PEFT's settings where diffusers wrote them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors_file:
            metadata = json.loads((tensors_file.metadata() or {}).get(METADATA) or "{}")
            tensors = {key: tensors_file.get_tensor(key) for key in tensors_file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, OSError) as exc:
        raise ModelError(
            f"{file} cannot be read as a LoRA in safetensors ({exc}); give such a file, other formats may run code"
        ) from exc
    if not tensors:
        raise ModelError(f"{file} holds no tensors; give a LoRA")
    return tensors, metadata if isinstance(metadata, dict) else {}


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
        for name in list_spellings(component, layer)
        for spelling in add_prefixes(component, name)
    }


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
    yield KOHYA_PREFIXES[component] + name.replace(".", "_")
