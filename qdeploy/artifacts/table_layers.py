"""How one layer or attention is quantized: its integer weight, scales and zero points, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from qdeploy.base.documents import Natural, Positive, ShortText
from qdeploy.base.errors import TableError

OPTIONAL_ARRAYS = ("input_ratio", "output_ratio", "output_zero_point", "bias")
SCALE_RANGE = (float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max))  # as engines compute
Scale = Annotated[float, Meta(ge=SCALE_RANGE[0], le=SCALE_RANGE[1])]


@dataclass(frozen=True)
class Affine:
    """Per-tensor unsigned quantization of an activation, ``bits`` wide: ``x ~ (q - zero_point) * scale``."""

    scale: Positive
    zero_point: int
    bits: Annotated[int, Meta(ge=2, le=16)] = 8

    def __post_init__(self) -> None:
        if not SCALE_RANGE[0] <= self.scale <= SCALE_RANGE[1]:
            raise TableError(f"activation scale must be a finite float32 above 0, got {self.scale}")
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
    output: of ``(y - offset) / output_ratio``, for engines that need Q after the layer; None where none does, or where
        the output stays in float for the sake of precision.
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

    @property
    def rounds_output(self) -> bool:
        """Whether engines that need Q after the layer round its output; after two passes none does."""
        return self.output is not None and self.passes == 1

    def with_float_output(self) -> LayerQuant:
        """The layer without the range of its output: no engine rounds that."""
        return replace(self, output=None, output_ratio=None, output_zero_point=None)


@dataclass(frozen=True)
class FloatLayer:
    """A Conv or Linear that stays in float, why, and its multiply-accumulates a call."""

    reason: ShortText
    macs: Natural


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
        """Bits of the codes of Q, K, V and the weights alike, 8 or 16."""
        return self.q.bits


def check_values(layer: LayerQuant) -> None:
    """TableError for arrays that no calibration makes: other types, NaN, scales of 0, codes beyond their bits."""
    half = 2 ** (layer.weight_bits - 1)
    if layer.weight.size and not -half <= int(layer.weight.min()) <= int(layer.weight.max()) < half:
        raise TableError(
            f"weight codes are {layer.weight.min()}..{layer.weight.max()}, expected {-half}..{half - 1} of "
            f"{layer.weight_bits} bits"
        )
    if layer.half_weight is not None and np.abs(layer.half_weight.astype(np.int16)).max(initial=0) > half // 2:
        raise TableError(f"half_weight has codes beyond +-{half // 2}, half the range of {layer.weight_bits} bits")
    for name in ("weight_scale", "input_ratio", "output_ratio", "bias"):
        array = getattr(layer, name)
        if array is not None and (array.dtype != np.float32 or not np.isfinite(array).all()):
            raise TableError(f"{name} is {array.dtype} or holds NaN or infinity, expected finite float32")
        if array is not None and name != "bias" and not (array > 0).all():
            raise TableError(f"{name} holds {array.min():g}, expected only positive values")
    if layer.output_zero_point is not None and layer.output_zero_point.dtype != np.uint8:
        raise TableError(f"output_zero_point is {layer.output_zero_point.dtype}, expected uint8")
