"""Integer products for torch: one custom operator with its reference on the CPU and its kernel for NVIDIA's GPUs.

An operator of torch's own library, so that ``torch.compile`` keeps it whole and fuses everything around it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from qdeploy.base.errors import EngineError
from qdeploy.engines.torch_graph.int8_shapes import compute_conv_shape

NAME = "qdeploy::int8_conv"
SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int[] stride, int[] padding, ScalarType dtype) -> Tensor"
)

LAUNCH_LOCK = threading.Lock()  # Triton's tuner keeps state while it runs


def launch_int8_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """``float(sum of x * weight) * scale + bias`` in ``dtype``; the sums are int32 and exact.

    x: int8 ``[N, H, W, C]``; weight: int8 ``[OC, KH, KW, C]``; scale, bias: float32 ``[OC]``; all contiguous.
    Returns ``[N, OH, OW, OC]``. Codes are around 0, so that padding is with code 0.
    """
    from qdeploy.engines.torch_graph.int8_kernels import int8_conv as launch

    check_operands(x, weight, scale, bias)
    with LAUNCH_LOCK:
        return launch(x, weight, scale, bias, (stride[0], stride[1]), (padding[0], padding[1]), dtype)


int8_conv = torch.library.custom_op(NAME, launch_int8_conv, mutates_args=(), device_types="cuda", schema=SCHEMA)


@int8_conv.register_kernel("cpu")
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The reference, for checks without a GPU: float64 holds every sum exactly."""
    check_operands(x, weight, scale, bias)
    turned, kernel = x.permute(0, 3, 1, 2).double(), weight.permute(0, 3, 1, 2).double()
    sums = F.conv2d(turned, kernel, None, list(stride), list(padding)).permute(0, 2, 3, 1)
    scaled = sums.float() * scale
    return (scaled if bias is None else scaled + bias).to(dtype).contiguous()


@int8_conv.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    shape = compute_conv_shape(x.shape, weight.shape, (stride[0], stride[1]), (padding[0], padding[1]))
    return x.new_empty((shape.n, shape.oh, shape.ow, shape.oc), dtype=dtype)


def check_operands(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
    """EngineError for operands that a kernel would read beyond the end of."""
    vectors = {"scale": scale} if bias is None else {"scale": scale, "bias": bias}
    for name, vector in vectors.items():
        if vector.shape != weight.shape[:1] or vector.dtype != torch.float32 or vector.device != x.device:
            raise EngineError(
                f"int8 product: {name} is {vector.dtype}{list(vector.shape)} on {vector.device}, expected "
                f"torch.float32[{weight.shape[0]}] on {x.device}"
            )
    if x.dtype != torch.int8 or weight.dtype != torch.int8 or weight.device != x.device:
        raise EngineError(f"int8 product: got {x.dtype} on {x.device} and {weight.dtype} on {weight.device}")


class Int8Conv(torch.nn.Module):
    """A quantized Conv of a picture: int8 codes ``[N, C, H, W]`` to ``[N, OC, OH, OW]``, channels last in memory."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        stride: list[int],
        padding: list[int],
        dtype: torch.dtype,
    ) -> None:
        """weight: int8 ``[OC, C, KH, KW]``; scale: of the activation times the weight's, ``[OC]``."""
        super().__init__()
        self.register_buffer("weight", weight.permute(0, 2, 3, 1).contiguous())
        self.register_buffer("scale", scale.float())
        self.register_buffer("bias", None if bias is None else bias.float())
        self.stride, self.padding, self.dtype = stride, padding, dtype

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """int8 ``[N, C, H, W]`` -> ``dtype[N, OC, OH, OW]``."""
        rows = codes.permute(0, 2, 3, 1).contiguous()
        product: torch.Tensor = torch.ops.qdeploy.int8_conv(
            rows, self.weight, self.scale, self.bias, self.stride, self.padding, self.dtype
        )
        return product.permute(0, 3, 1, 2)


class Int8Linear(torch.nn.Module):
    """Quantized products of one tensor of int8 codes ``[..., K]`` with one or several weights, computed as one.

    Gives ``[..., OUT]`` for each weight. A single product of three times the width fills a GPU better than three.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """weights: int8 ``[OUT, K]``; scales: of the activation times the weight's, ``[OUT]`` each."""
        super().__init__()
        self.register_buffer("weight", torch.cat(list(weights))[:, None, None].contiguous())
        self.register_buffer("scale", torch.cat(list(scales)).float())
        self.register_buffer("bias", None if bias is None else bias.float())
        self.sizes, self.dtype = [len(weight) for weight in weights], dtype

    def forward(self, codes: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """int8 ``[..., K]`` -> ``dtype[..., OUT]``, one for each weight; by itself where there is one weight."""
        rows = codes.reshape(1, 1, -1, codes.shape[-1]).contiguous()
        flat = torch.ops.qdeploy.int8_conv(rows, self.weight, self.scale, self.bias, [1, 1], [0, 0], self.dtype)
        product: torch.Tensor = flat.reshape(*codes.shape[:-1], -1)
        if len(self.sizes) == 1:
            return product
        parts: tuple[torch.Tensor, ...] = product.split(self.sizes, -1)
        return parts
