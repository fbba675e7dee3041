"""The QuantTable: integer weights, scales and zero points of a quantized model, in one safetensors file.

It is the one source of truth between quantizing and exporting. Arrays lie in the file as tensors
named ``component/layer/field``; everything else is one JSON document in the file's header, so that
a fresh process needs no flags and no forward pass to use it. Loading never runs code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.components import get_kind
from qdeploy.artifacts.decibels import limit_db, restore_db
from qdeploy.artifacts.noise_correction import NoiseCorrection
from qdeploy.artifacts.table_header import (
    HALF_WEIGHT,
    SCHEMA_VERSION,
    ComponentHeader,
    LayerHeader,
    TableHeader,
    parse_header,
)
from qdeploy.artifacts.table_layers import (
    OPTIONAL_ARRAYS,
    Affine,
    AttentionQuant,
    FloatLayer,
    LayerQuant,
    check_values,
)
from qdeploy.base.arrays import AnyArray, Feeds
from qdeploy.base.errors import TableError, join_names
from qdeploy.base.files import stage_file

NOISE_CORRECTION = "noise_correction/"
REMEDY = "make it again with `qdeploy quantize`"
__all__ = [
    "Affine",
    "AttentionQuant",
    "ComponentQuant",
    "FloatLayer",
    "LayerQuant",
    "QuantTable",
    "load_table",
    "pack_int4",
    "save_table",
    "unpack_int4",
]


@dataclass(frozen=True)
class ComponentQuant:
    """Everything the table holds on one component (text_encoder, unet, vae_decoder)."""

    layers: Mapping[str, LayerQuant]
    float_layers: Mapping[str, FloatLayer] = field(default_factory=dict)
    macs: Mapping[str, int] = field(default_factory=dict)
    rewrites: Sequence[str] = ()  # exact rewrites of the float module, made before its layers were named
    sensitivity_db: Mapping[str, float] = field(default_factory=dict)  # output SQNR with only that layer quantized
    attention: Mapping[str, AttentionQuant] = field(default_factory=dict)  # by Attention module; others are float
    # SQNR of the simulator against the float component on the table's probes, when it was made; an older table has none
    simulator_sqnr_db: float | None = None

    def in_half_range(self) -> ComponentQuant:
        """The component with every layer's weight codes in half their range, as far as the table has them."""
        return replace(self, layers={name: layer.in_half_range() for name, layer in self.layers.items()})

    def move_to_float(self, reasons: Mapping[str, str]) -> ComponentQuant:
        """The component with these layers in float, each for its reason; all others as they are."""
        moved = {name: FloatLayer(reason, self.macs[name]) for name, reason in reasons.items()}
        return replace(
            self,
            layers={name: layer for name, layer in self.layers.items() if name not in moved},
            macs={name: macs for name, macs in self.macs.items() if name not in moved},
            float_layers={**self.float_layers, **moved},
        )

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates a call of every Conv and Linear, float ones included."""
        return sum(self.macs.values()) + sum(layer.macs for layer in self.float_layers.values())

    @property
    def weight_bits(self) -> tuple[int, ...]:
        """Widths of quantized weights in use, the widest first."""
        return tuple(sorted({layer.weight_bits for layer in self.layers.values()}, reverse=True))

    def integer_mac_share(self) -> float:
        """Share of Conv and Linear multiply-accumulates in quantized layers, 0..1."""
        total = self.total_macs
        return sum(self.macs.values()) / total if total else 0.0


@dataclass(frozen=True)
class QuantTable:
    """Quantization of a whole model plus where it came from.

    probes: per component a few recorded inputs, on which an export is compared with the simulator.
    noise_correction: of the UNet's output, for the runtime's denoising loop.
    """

    components: Mapping[str, ComponentQuant]
    model: str
    model_sha256: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    probes: Mapping[str, Sequence[Feeds]] = field(default_factory=dict)
    noise_correction: NoiseCorrection | None = None


def save_table(table: QuantTable, path: Path) -> None:
    """Write ``table`` to ``path`` (safetensors), atomically; TableError where it holds NaN."""
    from safetensors.numpy import save_file

    tensors: dict[str, AnyArray] = {}
    for component, quant in table.components.items():
        for name, layer in quant.layers.items():
            tensors.update({f"{component}/{name}/{key}": array for key, array in _layer_arrays(layer).items()})
    for component, probes in table.probes.items():
        for number, feeds in enumerate(probes):
            tensors.update({f"probe/{component}/{number}/{name}": np.asarray(x) for name, x in feeds.items()})
    if table.noise_correction is not None:
        tensors.update({NOISE_CORRECTION + name: x for name, x in table.noise_correction.arrays().items()})
    try:
        header = json.dumps(_header_from_table(table), allow_nan=False)
    except ValueError as exc:
        raise TableError(
            f"the table for {path} holds NaN or infinity ({exc}); the model or its data are broken"
        ) from exc
    with stage_file(path, sum(array.nbytes for array in tensors.values())) as scratch:
        save_file(tensors, scratch, metadata={"qdeploy_table": header})


def load_table(path: Path) -> QuantTable:
    """Read a table, checked as a whole; TableError naming file and field when it is none, cut, or not to be used."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            header = parse_header((file.metadata() or {}).get("qdeploy_table"), str(path), REMEDY)
            return _TableReader(file, header).read()
    except TableError as exc:
        raise TableError(f"{path}: {exc}; {REMEDY}" if str(path) not in str(exc) else str(exc)) from exc
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as exc:
        raise TableError(f"{path} is not a readable qdeploy table ({exc}); {REMEDY}") from exc


class _TableReader:
    """Reads the tensors that a header lists from an opened safetensors file, and refuses all others in it."""

    def __init__(self, file: Any, header: TableHeader) -> None:
        self._file = file
        self._header = header
        self._unread = set(file.keys())

    def read(self) -> QuantTable:
        header = self._header
        for name in header.components:
            try:
                get_kind(name)
            except KeyError as exc:
                raise TableError(f"it has a component {name!r:.60}, which this qdeploy does not know") from exc
        components = {name: self._read_component(name, entry) for name, entry in header.components.items()}
        probes = {name: self._read_probes(name, count) for name, count in header.probes.items()}
        correction = self._read_noise_correction() if header.noise_correction else None
        if self._unread:
            raise TableError(f"it holds tensors that its header does not list: {join_names(sorted(self._unread))}")
        return QuantTable(components, header.model, header.model_sha256, header.provenance, probes, correction)

    def _tensor(self, name: str) -> NDArray[Any]:
        if name not in self._unread:
            raise TableError(f"it holds no tensor {name}, which its header lists")
        self._unread.remove(name)
        tensor: NDArray[Any] = self._file.get_tensor(name)
        return tensor

    def _read_component(self, component: str, entry: ComponentHeader) -> ComponentQuant:
        layers = {name: self._read_layer(f"{component}/{name}", layer) for name, layer in entry.layers.items()}
        return ComponentQuant(
            layers=layers,
            float_layers=entry.float_layers,
            macs={name: layer.macs for name, layer in entry.layers.items()},
            rewrites=entry.rewrites,
            sensitivity_db={name: restore_db(db) for name, db in entry.sensitivity_db.items()},
            attention=entry.attention,
            simulator_sqnr_db=None if entry.simulator_sqnr_db is None else restore_db(entry.simulator_sqnr_db),
        )

    def _read_layer(self, path: str, header: LayerHeader) -> LayerQuant:
        try:
            weight = self._tensor(f"{path}/weight")
            if header.weight_bits <= 4:
                weight = unpack_int4(_check_packed(weight, header.shape), header.shape)
            if weight.shape != header.shape:
                raise TableError(f"weight {list(weight.shape)} does not match {list(header.shape)}")
            layer = LayerQuant(
                weight=weight,
                weight_scale=self._tensor(f"{path}/weight_scale"),
                weight_bits=header.weight_bits,
                input=header.input,
                output=header.output,
                passes=header.passes,
                symmetric_scale=header.symmetric_scale,
                first_token_float=header.first_token_float,
                half_weight=self._tensor(f"{path}/{HALF_WEIGHT}") if header.half_weight else None,
                **{name: self._tensor(f"{path}/{name}") for name in header.arrays},
            )
            check_values(layer)
        except TableError as exc:
            raise TableError(f"{path}: {exc}") from exc
        return layer

    def _read_probes(self, component: str, count: int) -> list[dict[str, NDArray[Any]]]:
        probes: list[dict[str, NDArray[Any]]] = [{} for _ in range(count)]
        start = f"probe/{component}/"
        for name in sorted(name for name in self._unread if name.startswith(start)):
            number, _, feed = name.removeprefix(start).partition("/")
            if not (number.isdecimal() and len(number) < 5 and int(number) < count and feed):
                raise TableError(f"the tensor {name} belongs to none of the {count} probes")
            probes[int(number)][feed] = self._tensor(name)
            array = probes[int(number)][feed]
            if array.dtype not in (np.float32, np.int64) or not np.isfinite(array).all():
                raise TableError(f"the probe {name} is {array.dtype} or holds NaN, expected float32 or int64")
        if any(set(probe) != set(probes[0]) or not probe for probe in probes):
            raise TableError(f"the {count} probes of {component} are incomplete")
        return probes

    def _read_noise_correction(self) -> NoiseCorrection:
        names = sorted(name for name in self._unread if name.startswith(NOISE_CORRECTION))
        return NoiseCorrection.from_arrays({name.removeprefix(NOISE_CORRECTION): self._tensor(name) for name in names})


def _header_from_table(table: QuantTable) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "model": table.model,
        "model_sha256": table.model_sha256,
        "provenance": dict(table.provenance),
        "components": {name: _component_header(quant) for name, quant in table.components.items()},
        "probes": {component: len(feeds) for component, feeds in table.probes.items()},
        "noise_correction": table.noise_correction is not None,
    }


def _component_header(quant: ComponentQuant) -> dict[str, Any]:
    return {
        "layers": {name: _layer_header(layer, quant.macs[name]) for name, layer in quant.layers.items()},
        "float_layers": {name: asdict(layer) for name, layer in quant.float_layers.items()},
        "rewrites": list(quant.rewrites),
        "sensitivity_db": {name: limit_db(db) for name, db in quant.sensitivity_db.items()},
        "attention": {name: asdict(attention) for name, attention in quant.attention.items()},
        "simulator_sqnr_db": None if quant.simulator_sqnr_db is None else limit_db(quant.simulator_sqnr_db),
    }


def _check_packed(packed: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    expected = (math.prod(shape) + 1) // 2
    if packed.dtype != np.uint8 or packed.shape != (expected,):
        raise TableError(f"4-bit weight is {packed.dtype}{list(packed.shape)}, expected uint8[{expected}]")
    return packed


def pack_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two 4-bit two's-complement codes a byte, low nibble first (ONNX INT4 order); flat."""
    flat = codes.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.int8(0))
    nibbles = flat.view(np.uint8) & 0x0F
    return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8)


def unpack_int4(packed: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Inverse of :func:`pack_int4`."""
    nibbles = np.stack([packed & 0x0F, packed >> 4], axis=1).reshape(-1)[: int(np.prod(shape))]
    return ((nibbles ^ 8).astype(np.int8) - 8).reshape(shape)


def _layer_arrays(layer: LayerQuant) -> dict[str, AnyArray]:
    packed = pack_int4(layer.weight) if layer.weight_bits <= 4 else layer.weight
    arrays: dict[str, AnyArray] = {"weight": packed, "weight_scale": layer.weight_scale}
    arrays |= {name: array for name in OPTIONAL_ARRAYS if (array := getattr(layer, name)) is not None}
    if layer.half_weight is not None:
        arrays[HALF_WEIGHT] = layer.half_weight
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _layer_header(layer: LayerQuant, macs: int) -> dict[str, Any]:
    return {
        "shape": list(layer.weight.shape),
        "weight_bits": layer.weight_bits,
        "input": asdict(layer.input),
        "output": None if layer.output is None else asdict(layer.output),
        "arrays": [name for name in OPTIONAL_ARRAYS if getattr(layer, name) is not None],
        "passes": layer.passes,
        "symmetric_scale": layer.symmetric_scale,
        "first_token_float": layer.first_token_float,
        HALF_WEIGHT: layer.half_weight is not None,
        "macs": macs,
    }
