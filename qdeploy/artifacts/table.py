"""The QuantTable: integer weights, scales and zero points of a quantized model, in one safetensors file.

It is the one source of truth between quantizing and exporting. Arrays lie in the file as tensors
named ``component/layer/field``; everything else is one JSON document in the file's header, so that
a fresh process needs no flags and no forward pass to use it. Loading never runs code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.noise_correction import NoiseCorrection
from qdeploy.base.errors import TableError
from qdeploy.base.files import stage_file

SCHEMA_VERSION = 2
NOISE_CORRECTION = "noise_correction/"
HALF_WEIGHT = "half_weight"
OPTIONAL_ARRAYS = ("input_ratio", "output_ratio", "output_zero_point", "bias")


@dataclass(frozen=True)
class Affine:
    """Per-tensor unsigned quantization of an activation, ``bits`` wide: ``x ~ (q - zero_point) * scale``."""

    scale: float
    zero_point: int
    bits: int = 8

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise TableError(f"activation scale must be finite and positive, got {self.scale}")
        if not 0 <= self.zero_point < 2**self.bits:
            raise TableError(f"activation zero point must lie in 0..{2**self.bits - 1}, got {self.zero_point}")


@dataclass(frozen=True)
class LayerQuant:
    """One quantized Conv or Linear, ``y = W x + b``.

    weight: ``int8[out, in, ...]`` codes of ``W * input_ratio`` (4-bit weights use [-8, 7] of them).
    half_weight: ``int8[out, in, ...]`` codes of half the range, within +-64 of 8 bits, at twice ``weight_scale``: one
        table serves targets of both ranges. None where all targets take ``weight``.
    weight_scale: ``float32[out]``, symmetric per output channel.
    input: quantization of ``x / input_ratio``.
    output: of ``(y - offset) / output_ratio``, for engines that need Q after the layer; None where none does.
    input_ratio: ``float32[in]``, per-channel equalization: x is divided by it before Q, and it moves into
        the weight, so that Q and DQ stay per tensor, as integer kernels want them.
    output_ratio, output_zero_point: ``float32[out]``, ``uint8[out]``: the same after the layer; ratio and
        offset = (zero_point - output_zero_point) * scale * ratio move into weight scale and bias.
    bias: ``float32[out]`` in place of the model's own, where it was corrected.
    passes: 2 adds a second integer pass over what the first one rounded off: a 16-bit activation.
    symmetric_scale: of ``x / input_ratio`` for engines that know signed codes around 0 only.
    first_token_float: of an input ``float32[B, T, in]``, token 0 goes through the model's own float weight and
        the ranges above are those of tokens 1..T-1 (MixDQ, Zhao et al. 2024, arXiv 2405.17873).
    """

    weight: NDArray[np.int8]
    weight_scale: NDArray[np.float32]
    weight_bits: int
    input: Affine
    output: Affine | None = None
    input_ratio: NDArray[np.float32] | None = None
    output_ratio: NDArray[np.float32] | None = None
    output_zero_point: NDArray[np.uint8] | None = None
    bias: NDArray[np.float32] | None = None
    passes: int = 1
    symmetric_scale: float | None = None
    first_token_float: bool = False
    half_weight: NDArray[np.int8] | None = None

    def __post_init__(self) -> None:
        half = self.half_weight
        if half is not None and (half.dtype != np.int8 or half.shape != self.weight.shape):
            raise TableError(
                f"half_weight must be int8{list(self.weight.shape)} like the weight, got {half.dtype}{list(half.shape)}"
            )
        if self.weight.dtype != np.int8 or self.weight_scale.shape != (self.weight.shape[0],):
            raise TableError(
                f"weight must be int8[out, ...] with float32[out] scales, got {self.weight.dtype}"
                f"{list(self.weight.shape)} and {list(self.weight_scale.shape)}"
            )
        if self.passes not in (1, 2):
            raise TableError(f"passes over an activation: got {self.passes}, expected 1 or 2")
        if self.first_token_float and self.weight.ndim != 2:
            raise TableError(f"only a Linear reads tokens, so first_token_float does not fit {list(self.weight.shape)}")
        for name, length in zip(OPTIONAL_ARRAYS, (self.weight.shape[1], *[self.weight.shape[0]] * 3), strict=True):
            array = getattr(self, name)
            if array is not None and array.shape != (length,):
                raise TableError(f"{name}: got {array.dtype}{list(array.shape)}, expected [{length}]")

    def in_half_range(self) -> LayerQuant:
        """The layer with weight codes of half the range (within +-64 of 8 bits) and scales twice as large.

        The layer itself where it has no such codes: below 8 bits, where the rounding was learned, or by choice.
        """
        if self.half_weight is None:
            return self
        return replace(self, weight=self.half_weight, weight_scale=2 * self.weight_scale, half_weight=None)


@dataclass(frozen=True)
class FloatLayer:
    """A Conv or Linear that stays in float, why, and its multiply-accumulates a call."""

    reason: str
    macs: int


@dataclass(frozen=True)
class AttentionQuant:
    """Quantization of the two products of one attention, softmax(Q K^T) V; all three of equal bits, 8 or 16.

    The weights of V, exp(s - max s), need no range: zero point 0 and scale ``1 / (2**bits - 1)``.
    """

    q: Affine
    k: Affine
    v: Affine

    def __post_init__(self) -> None:
        if len({self.q.bits, self.k.bits, self.v.bits}) != 1 or self.bits not in (8, 16):
            raise TableError(
                f"attention bits of q, k and v: got {self.q.bits}, {self.k.bits} and {self.v.bits}, expected 8 or 16"
            )

    @property
    def bits(self) -> int:
        return self.q.bits


@dataclass(frozen=True)
class ComponentQuant:
    """Everything the table holds on one component (text_encoder, unet, vae_decoder)."""

    layers: Mapping[str, LayerQuant]
    float_layers: Mapping[str, FloatLayer] = field(default_factory=dict)
    macs: Mapping[str, int] = field(default_factory=dict)
    rewrites: Sequence[str] = ()  # exact rewrites of the float module, made before its layers were named
    sensitivity_db: Mapping[str, float] = field(default_factory=dict)  # output SQNR with only that layer quantized
    attention: Mapping[str, AttentionQuant] = field(default_factory=dict)  # by Attention module; others are float

    def in_half_range(self) -> ComponentQuant:
        """The component with every layer's weight codes in half their range, as far as the table has them."""
        return replace(self, layers={name: layer.in_half_range() for name, layer in self.layers.items()})

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
    probes: Mapping[str, Sequence[Mapping[str, NDArray]]] = field(default_factory=dict)
    noise_correction: NoiseCorrection | None = None


def save_table(table: QuantTable, path: Path) -> None:
    """Write ``table`` to ``path`` (safetensors), atomically."""
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
            "rewrites": list(quant.rewrites),
            "sensitivity_db": dict(quant.sensitivity_db),
            "attention": {name: asdict(attention) for name, attention in quant.attention.items()},
        }
        for name, layer in quant.layers.items():
            tensors.update({f"{component}/{name}/{key}": array for key, array in _layer_arrays(layer).items()})
    header["probes"] = {component: len(feeds) for component, feeds in table.probes.items()}
    for component, probes in table.probes.items():
        for number, feeds in enumerate(probes):
            tensors.update({f"probe/{component}/{number}/{name}": np.asarray(x) for name, x in feeds.items()})
    header["noise_correction"] = table.noise_correction is not None
    if table.noise_correction is not None:
        tensors.update({NOISE_CORRECTION + name: x for name, x in table.noise_correction.arrays().items()})
    with stage_file(path) as scratch:
        save_file(tensors, scratch, metadata={"qdeploy_table": json.dumps(header)})


def load_table(path: Path) -> QuantTable:
    """Read a table; TableError when the file is not one, is truncated, or is from a newer qdeploy."""
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
            probes = {name: _read_probes(file, name, count) for name, count in header["probes"].items()}
            correction = _read_noise_correction(file) if header["noise_correction"] else None
            return QuantTable(
                components, header["model"], header["model_sha256"], header["provenance"], probes, correction
            )
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


def _layer_arrays(layer: LayerQuant) -> dict[str, NDArray]:
    packed = pack_int4(layer.weight) if layer.weight_bits <= 4 else layer.weight
    arrays = {"weight": packed, "weight_scale": layer.weight_scale}
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


def _read_noise_correction(file: Any) -> NoiseCorrection:
    names = [name for name in file.keys() if name.startswith(NOISE_CORRECTION)]  # noqa: SIM118 - not a dict
    return NoiseCorrection.from_arrays({name.removeprefix(NOISE_CORRECTION): file.get_tensor(name) for name in names})


def _read_probes(file: Any, component: str, count: int) -> list[dict[str, NDArray]]:
    names = list(file.keys())
    return [
        {name.removeprefix(start): file.get_tensor(name) for name in names if name.startswith(start)}
        for start in (f"probe/{component}/{number}/" for number in range(count))
    ]


def _component_from_header(component: str, entry: Any, tensor: Any) -> ComponentQuant:
    layers = {
        name: _layer_from_header(f"{component}/{name}", header, tensor) for name, header in entry["layers"].items()
    }
    return ComponentQuant(
        layers=layers,
        float_layers={name: FloatLayer(**header) for name, header in entry["float_layers"].items()},
        macs={name: header["macs"] for name, header in entry["layers"].items()},
        rewrites=tuple(map(str, entry["rewrites"])),
        sensitivity_db={str(name): float(value) for name, value in entry["sensitivity_db"].items()},
        attention={
            name: AttentionQuant(**{part: Affine(**affine) for part, affine in header.items()})
            for name, header in entry.get("attention", {}).items()
        },
    )


def _layer_from_header(path: str, header: Any, tensor: Any) -> LayerQuant:
    weight = tensor(f"{path}/weight")
    if header["weight_bits"] <= 4:
        weight = unpack_int4(weight, tuple(header["shape"]))
    if list(weight.shape) != header["shape"]:
        raise TableError(f"{path}: weight {list(weight.shape)} does not match {header['shape']}")
    unknown = set(header["arrays"]) - set(OPTIONAL_ARRAYS)
    if unknown:
        raise TableError(f"{path}: this qdeploy knows no {', '.join(sorted(unknown))}")
    return LayerQuant(
        weight=weight,
        weight_scale=tensor(f"{path}/weight_scale"),
        weight_bits=header["weight_bits"],
        input=Affine(**header["input"]),
        output=None if header["output"] is None else Affine(**header["output"]),
        passes=header["passes"],
        symmetric_scale=header["symmetric_scale"],
        first_token_float=header.get("first_token_float", False),
        half_weight=tensor(f"{path}/{HALF_WEIGHT}") if header.get(HALF_WEIGHT, False) else None,
        **{name: tensor(f"{path}/{name}") for name in header["arrays"]},
    )
