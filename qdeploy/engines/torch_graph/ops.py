"""Each ONNX operator in torch: every operator in the exports of the targets for GPUs.

Source: https://onnx.ai/onnx/operators. An entry of ``OPS`` takes a node and gives the function of its tensors and how
many of the node's inputs, from the first on, are such tensors; the others decide shapes and are read from the file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F

from qdeploy.engines.torch_graph.steps import (
    TORCH_TYPES,
    GraphStep,
    get_name,
    get_output_names,
    has_input,
    make_unsupported_error,
    read_argument,
    read_integers,
)

Compute = Callable[..., Any]
Reader = Callable[[ir.Node], tuple[Compute, int]]


def step_from_node(node: ir.Node) -> GraphStep:
    """The step of a node by itself; EngineError for an operator or a form of it that is not known here."""
    if node.domain or node.op_type not in OPS:
        raise make_unsupported_error(
            node, f"the operator {node.domain or 'ai.onnx'}.{node.op_type} is not known; export for tensorrt"
        )
    compute, count = OPS[node.op_type](node)
    inputs = tuple(map(get_name, node.inputs[:count]))
    return GraphStep(node.op_type, (node.name or "",), inputs, get_output_names(node), compute)


def wrap_function(compute: Compute) -> Reader:
    """An operator without attributes that counts."""
    return lambda node: (compute, len(node.inputs))


def reshape(node: ir.Node) -> tuple[Compute, int]:
    """Sides are constants; 0 keeps the input's side unless ``allowzero`` is set."""
    sides, zero_is_zero = read_integers(node, 1), node.attributes.get_int("allowzero", 0)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return x.reshape([x.shape[at] if side == 0 and not zero_is_zero else side for at, side in enumerate(sides)])

    return compute, 1


def transpose(node: ir.Node) -> tuple[Compute, int]:
    """Without ``perm`` the axes are reversed."""
    order = node.attributes.get_ints("perm")
    return (lambda x: x.permute(order if order is not None else tuple(reversed(range(x.ndim))))), 1


def unsqueeze(node: ir.Node) -> tuple[Compute, int]:
    """Axes count in the output, negative ones from its end."""
    axes = read_integers(node, 1)

    def compute(x: torch.Tensor) -> torch.Tensor:
        rank = x.ndim + len(axes)
        for axis in sorted(axis % rank for axis in axes):
            x = x.unsqueeze(axis)
        return x

    return compute, 1


def squeeze(node: ir.Node) -> tuple[Compute, int]:
    """Axes are constants."""
    axes = read_integers(node, 1)
    return (lambda x: x.squeeze(axes)), 1


def concat(node: ir.Node) -> tuple[Compute, int]:
    """Of all inputs, along ``axis``."""
    axis = node.attributes.get_int("axis")
    return (lambda *parts: torch.cat(parts, axis)), len(node.inputs)


def split(node: ir.Node) -> tuple[Compute, int]:
    """By the constant sizes, else into as many equal parts as the node has outputs, the last one smaller."""
    axis, count = node.attributes.get_int("axis", 0), len(node.outputs)
    sizes = read_integers(node, 1) if has_input(node, 1) else None

    def compute(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts: tuple[torch.Tensor, ...] = x.split(sizes if sizes is not None else -(-x.shape[axis] // count), axis)
        return parts

    return compute, 1


def slice_(node: ir.Node) -> tuple[Compute, int]:
    """Starts, ends, axes and steps are constants; EngineError for a step that is not positive, which torch lacks."""
    starts, ends = read_integers(node, 1), read_integers(node, 2)
    axes = read_integers(node, 3) if has_input(node, 3) else list(range(len(starts)))
    strides = read_integers(node, 4) if has_input(node, 4) else [1] * len(starts)
    if min(strides) < 1:
        raise make_unsupported_error(node, f"steps {strides}, expected positive ones")

    def compute(x: torch.Tensor) -> torch.Tensor:
        selection = [slice(None)] * x.ndim
        for axis, start, end, stride in zip(axes, starts, ends, strides, strict=True):
            selection[axis] = slice(start, end, stride)
        return x[tuple(selection)]

    return compute, 1


def gather(node: ir.Node) -> tuple[Compute, int]:
    """``x[..., indices, ...]`` along ``axis`` for indices of any rank, negative ones from the end."""
    axis = node.attributes.get_int("axis", 0)

    def compute(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        selected = x.index_select(axis, indices.reshape(-1).long() % x.shape[axis])
        return selected.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis:][1:]])

    return compute, 2


def expand(node: ir.Node) -> tuple[Compute, int]:
    """Broadcasts both ways, as ONNX does: a side of 1 keeps the input's."""
    sides = read_integers(node, 1)
    return (lambda x: x.expand(torch.broadcast_shapes(x.shape, tuple(sides)))), 1


def cast(node: ir.Node) -> tuple[Compute, int]:
    """EngineError for a type that torch does not have."""
    dtype = TORCH_TYPES.get(ir.DataType(node.attributes.get_int("to")))
    if dtype is None:
        raise make_unsupported_error(node, "torch has no such type")
    return (lambda x: x.to(dtype)), 1


def gemm(node: ir.Node) -> tuple[Compute, int]:
    """``alpha op(A) op(B) + beta C``."""
    attributes = node.attributes
    alpha, beta = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    transpose_a, transpose_b = attributes.get_int("transA", 0), attributes.get_int("transB", 0)

    def compute(a: torch.Tensor, b: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        product = multiply((a.T if transpose_a else a) @ (b.T if transpose_b else b), alpha)
        return product + multiply(bias[0], beta) if bias else product

    return compute, len(node.inputs)


def multiply(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Without a kernel for a factor of 1, which exports nearly always have."""
    return x if factor == 1.0 else x * factor


def conv(node: ir.Node) -> tuple[Compute, int]:
    """Of pictures ``[N, C, H, W]``; what :func:`read_conv_settings` refuses is refused."""
    stride, padding, dilation, groups = read_conv_settings(node)

    def compute(x: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, bias[0] if bias else None, stride, padding, dilation, groups)

    return compute, len(node.inputs)


def read_conv_settings(node: ir.Node) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups of a Conv of pictures; EngineError for paddings that differ by side."""
    attributes = node.attributes
    pads = list(attributes.get_ints("pads", (0, 0, 0, 0)))
    if attributes.get_string("auto_pad", "NOTSET") != "NOTSET" or len(pads) != 4 or pads[:2] != pads[2:]:
        raise make_unsupported_error(node, f"pads {pads}, expected the same on both sides of a picture")
    stride, dilation = list(attributes.get_ints("strides", (1, 1))), list(attributes.get_ints("dilations", (1, 1)))
    return stride, pads[:2], dilation, attributes.get_int("group", 1)


def pad(node: ir.Node) -> tuple[Compute, int]:
    """Constants around all axes; EngineError for other modes."""
    if node.attributes.get_string("mode", "constant") != "constant" or has_input(node, 3):
        raise make_unsupported_error(node, "expected constants around all axes")
    ends, rank = read_integers(node, 1), len(read_integers(node, 1)) // 2
    value = read_argument(node, 2).item() if has_input(node, 2) else 0.0
    sides = [ends[axis + side * rank] for axis in reversed(range(rank)) for side in (0, 1)]
    return (lambda x: F.pad(x, sides, value=value)), 1


def resize(node: ir.Node) -> tuple[Compute, int]:
    """Nearest neighbours by whole factors, as diffusers' upsamplers do."""
    attributes, scales = node.attributes, read_integers(node, 2) if has_input(node, 2) else []
    forms = (
        attributes.get_string("coordinate_transformation_mode"),
        attributes.get_string("mode"),
        attributes.get_string("nearest_mode"),
    )
    if forms != ("asymmetric", "nearest", "floor") or len(scales) != 4 or scales[:2] != [1, 1]:
        raise make_unsupported_error(
            node, f"the form {forms} by {scales}, expected asymmetric nearest floor by whole factors"
        )
    return (lambda x: F.interpolate(x, scale_factor=[float(scale) for scale in scales[2:]], mode="nearest")), 1


def softmax(node: ir.Node) -> tuple[Compute, int]:
    """Along ``axis``, by default the last."""
    axis = node.attributes.get_int("axis", -1)
    return (lambda x: x.softmax(axis)), 1


def wrap_arg(compute: Callable[..., torch.Tensor]) -> Reader:
    """ArgMin or ArgMax: the first of equal values, int64."""

    def read(node: ir.Node) -> tuple[Compute, int]:
        axis, keep = node.attributes.get_int("axis", 0), bool(node.attributes.get_int("keepdims", 1))
        return (lambda x: compute(x, axis, keep)), 1

    return read


def gather_elements(node: ir.Node) -> tuple[Compute, int]:
    """An index counts from the end where it is negative."""
    axis = node.attributes.get_int("axis", 0)
    return (lambda x, indices: x.gather(axis, torch.where(indices < 0, indices + x.shape[axis], indices))), 2


def gelu(node: ir.Node) -> tuple[Compute, int]:
    """``approximate`` is ``none`` (erf) or ``tanh``."""
    form = node.attributes.get_string("approximate", "none")
    return (lambda x: F.gelu(x, approximate=form)), 1


def layer_norm(node: ir.Node) -> tuple[Compute, int]:
    """Over the last axis; EngineError for more axes or for the outputs of training."""
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    if node.attributes.get_int("axis", -1) != -1 or len(node.outputs) > 1:
        raise make_unsupported_error(node, "expected only the last axis")
    return (lambda x, weight, *bias: F.layer_norm(x, x.shape[-1:], weight, bias[0] if bias else None, epsilon)), len(
        node.inputs
    )


def instance_norm(node: ir.Node) -> tuple[Compute, int]:
    """Each channel of each sample by itself, ``[N, C, ...]``."""
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return (lambda x, weight, bias: F.instance_norm(x, weight=weight, bias=bias, eps=epsilon)), 3


def quantize(node: ir.Node) -> tuple[Compute, int]:
    """``clip(round(x / scale) + zero_point)``, halves to even; one scale for the tensor."""
    zero = node.inputs[2] if has_input(node, 2) else None
    dtype = TORCH_TYPES[zero.dtype] if zero is not None and zero.dtype is not None else torch.uint8
    limits = torch.iinfo(dtype)

    def compute(x: torch.Tensor, scale: torch.Tensor, *zero_point: torch.Tensor) -> torch.Tensor:
        codes = torch.round(x.float() / scale.float())
        codes = codes + zero_point[0].float() if zero_point else codes
        return codes.clamp(limits.min, limits.max).to(dtype)

    return compute, len(node.inputs)


def dequantize(node: ir.Node) -> tuple[Compute, int]:
    """``(codes - zero_point) * scale``, by one scale or by one for each index of ``axis``."""
    axis = node.attributes.get_int("axis", 1)

    def compute(codes: torch.Tensor, scale: torch.Tensor, *zero_point: torch.Tensor) -> torch.Tensor:
        sides = [1] * codes.ndim
        if scale.ndim:
            sides[axis] = -1
        centred = codes.float() - zero_point[0].float().reshape(sides) if zero_point else codes.float()
        return (centred * scale.float().reshape(sides)).to(scale.dtype)

    return compute, len(node.inputs)


OPS: dict[str, Reader] = {
    "Add": wrap_function(torch.add),
    "ArgMax": wrap_arg(torch.argmax),
    "ArgMin": wrap_arg(torch.argmin),
    "Cast": cast,
    "Concat": concat,
    "Conv": conv,
    "Cos": wrap_function(torch.cos),
    "DequantizeLinear": dequantize,
    "Div": wrap_function(torch.div),
    "Equal": wrap_function(torch.eq),
    "Erf": wrap_function(torch.erf),
    "Exp": wrap_function(torch.exp),
    "Expand": expand,
    "Gather": gather,
    "GatherElements": gather_elements,
    "Gelu": gelu,
    "Gemm": gemm,
    "Identity": wrap_function(torch.clone),
    "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm,
    "MatMul": wrap_function(torch.matmul),
    "Mul": wrap_function(torch.mul),
    "Neg": wrap_function(torch.neg),
    "Pad": pad,
    "QuantizeLinear": quantize,
    "Relu": wrap_function(torch.relu),
    "Reshape": reshape,
    "Resize": resize,
    "Sigmoid": wrap_function(torch.sigmoid),
    "Sin": wrap_function(torch.sin),
    "Slice": slice_,
    "Softmax": softmax,
    "Split": split,
    "Sqrt": wrap_function(torch.sqrt),
    "Squeeze": squeeze,
    "Sub": wrap_function(torch.sub),
    "Tanh": wrap_function(torch.tanh),
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
