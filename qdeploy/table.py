"""The QuantTable: integer weights, scales and zero points of a quantized model, in one safetensors file.

It is the one source of truth between quantizing and exporting. Arrays lie in the file as tensors
named ``component/layer/field``; everything else is one JSON document in the file's header, so that
a fresh process needs no flags and no forward pass to use it. Loading never runs code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import TableError
from qdeploy.files import staged_file

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Affine:
    """Per-tensor unsigned 8-bit quantization of an activation: ``x ~ (q - zero_point) * scale``."""

    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise TableError(f"activation scale must be finite and positive, got {self.scale}")
        if not 0 <= self.zero_point <= 255:
            raise TableError(f"activation zero point must lie in 0..255, got {self.zero_point}")


@dataclass(frozen=True)
class LayerQuant:
    """One quantized Conv or Linear.

    weight: ``int8[out, in, ...]`` codes (4-bit weights use [-8, 7] of them).
    weight_scale: ``float32[out]``, symmetric per output channel.
    input: quantization of the layer's input activation.
    output: of its output, used where an engine needs Q behind the layer; None for Linear.
    """

    weight: NDArray[np.int8]
    weight_scale: NDArray[np.float32]
    weight_bits: int
    input: Affine
    output: Affine | None = None

    def __post_init__(self) -> None:
        if self.weight.dtype != np.int8 or self.weight_scale.shape != (self.weight.shape[0],):
            raise TableError(
                f"weight must be int8[out, ...] with float32[out] scales, got {self.weight.dtype}"
                f"{list(self.weight.shape)} and {list(self.weight_scale.shape)}"
            )


@dataclass(frozen=True)
class FloatLayer:
    """A Conv or Linear that stays in float, why, and its multiply-accumulates a call."""

    reason: str
    macs: int


@dataclass(frozen=True)
class ComponentQuant:
    """Everything the table holds on one component (text_encoder, unet, vae_decoder)."""

    layers: Mapping[str, LayerQuant]
    float_layers: Mapping[str, FloatLayer] = field(default_factory=dict)
    macs: Mapping[str, int] = field(default_factory=dict)

    def integer_mac_share(self) -> float:
        """Share of Conv and Linear multiply-accumulates in quantized layers, 0..1."""
        quantized = sum(self.macs[name] for name in self.layers)
        total = quantized + sum(layer.macs for layer in self.float_layers.values())
        return quantized / total if total else 0.0


@dataclass(frozen=True)
class QuantTable:
    """Quantization of a whole model plus where it came from.

    probes: per component a few recorded inputs, on which an export is compared with the simulator.
    """

    components: Mapping[str, ComponentQuant]
    model: str
    model_sha256: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    probes: Mapping[str, Sequence[Mapping[str, NDArray]]] = field(default_factory=dict)


def save_table(table: QuantTable, path: Path) -> None:
    """Write ``table`` to ``path`` (safetensors), aside first and then renamed."""
    from safetensors.numpy import save_file

    tensors: dict[str, NDArray] = {}
    header: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": table.model,
        "model_sha256": table.model_sha256,
        "provenance": dict(table.provenance),
        "components": {},
    }
    for component, quant in table.components.items():
        header["components"][component] = {
            "layers": {name: _layer_header(layer, quant.macs[name]) for name, layer in quant.layers.items()},
            "float_layers": {name: asdict(layer) for name, layer in quant.float_layers.items()},
        }
        for name, layer in quant.layers.items():
            packed = pack_int4(layer.weight) if layer.weight_bits == 4 else layer.weight
            tensors[f"{component}/{name}/weight"] = np.ascontiguousarray(packed)
            tensors[f"{component}/{name}/weight_scale"] = np.ascontiguousarray(layer.weight_scale)
    header["probes"] = {component: len(feeds) for component, feeds in table.probes.items()}
    for component, probes in table.probes.items():
        for number, feeds in enumerate(probes):
            tensors.update({f"probe/{component}/{number}/{name}": np.asarray(x) for name, x in feeds.items()})
    with staged_file(path) as scratch:
        save_file(tensors, scratch, metadata={"qdeploy_table": json.dumps(header)})


def load_table(path: Path) -> QuantTable:
    """Read a table; TableError when the file is not one, is cut, or is from a newer qdeploy."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["qdeploy_table"])
            if header["schema_version"] != SCHEMA_VERSION:
                raise TableError(
                    f"{path} has table schema {header['schema_version']}, this qdeploy reads {SCHEMA_VERSION}"
                )
            components = {
                name: _component_from_header(name, entry, file.get_tensor)
                for name, entry in header["components"].items()
            }
            probes = {name: _probes(file, name, count) for name, count in header["probes"].items()}
            return QuantTable(components, header["model"], header["model_sha256"], header["provenance"], probes)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as exc:
        raise TableError(
            f"{path} is not a readable qdeploy table ({exc}); make it again with `qdeploy quantize`"
        ) from exc


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


def _layer_header(layer: LayerQuant, macs: int) -> dict[str, Any]:
    return {
        "shape": list(layer.weight.shape),
        "weight_bits": layer.weight_bits,
        "input": asdict(layer.input),
        "output": None if layer.output is None else asdict(layer.output),
        "macs": macs,
    }


def _probes(file: Any, component: str, count: int) -> list[dict[str, NDArray]]:
    names = list(file.keys())
    return [
        {name.removeprefix(start): file.get_tensor(name) for name in names if name.startswith(start)}
        for start in (f"probe/{component}/{number}/" for number in range(count))
    ]


def _component_from_header(component: str, entry: Any, tensor: Any) -> ComponentQuant:
    layers = {}
    for name, header in entry["layers"].items():
        weight = tensor(f"{component}/{name}/weight")
        if header["weight_bits"] == 4:
            weight = unpack_int4(weight, tuple(header["shape"]))
        if list(weight.shape) != header["shape"]:
            raise TableError(f"{component}/{name}: weight {list(weight.shape)} does not match {header['shape']}")
        layers[name] = LayerQuant(
            weight=weight,
            weight_scale=tensor(f"{component}/{name}/weight_scale"),
            weight_bits=header["weight_bits"],
            input=Affine(**header["input"]),
            output=None if header["output"] is None else Affine(**header["output"]),
        )
    return ComponentQuant(
        layers=layers,
        float_layers={name: FloatLayer(**header) for name, header in entry["float_layers"].items()},
        macs={name: header["macs"] for name, header in entry["layers"].items()},
    )
