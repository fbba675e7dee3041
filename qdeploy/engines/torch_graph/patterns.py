"""Several nodes that torch or our kernels compute as one step: quantized layers, attentions, group norms.

A pattern is recognised at its last node and reads the values in front of its first. The nodes between are not marked:
steps that are no longer read are dropped by ``module.drop_unused``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F

from qdeploy.engines.torch_graph.int8 import Int8Conv, Int8Linear
from qdeploy.engines.torch_graph.ops import read_conv_settings
from qdeploy.engines.torch_graph.steps import (
    TORCH_TYPES,
    GraphStep,
    get_name,
    get_output_names,
    has_input,
    read_constant,
    tensor_from_value,
)

KEYS_LAST = (0, 1, 3, 2)


def match_pattern(node: ir.Node) -> GraphStep | None:
    """The step that replaces ``node`` and those before it; None where no pattern ends."""
    for step in (match_int8_conv(node), match_int8_linear(node), match_attention(node), match_group_norm(node)):
        if step is not None:
            return step
    return None


def match_int8_conv(node: ir.Node) -> GraphStep | None:
    """Q - DQ - Conv of a weight's DQ: codes around 0, one group, no dilation."""
    if node.op_type != "Conv":
        return None
    codes, weight = find_activation_codes(node.inputs[0]), find_weight_codes(node.inputs[1], axis=0)
    stride, padding, dilation, groups = read_conv_settings(node)
    if codes is None or weight is None or groups != 1 or dilation != [1, 1] or not has_plain_bias(node, weight, 0):
        return None
    bias = read_bias(node, weight, 0)
    scale = read_scale(node.inputs[0]) * read_scale(node.inputs[1])
    compute = Int8Conv(
        tensor_from_value(weight), expand_per_channel(scale, weight, 0), bias, stride, padding, get_output_type(node)
    )
    return make_product_step(node, codes, weight, compute)


def match_int8_linear(node: ir.Node) -> GraphStep | None:
    """Q - DQ - MatMul or Gemm with a weight's DQ, codes around 0."""
    attributes = node.attributes
    if node.op_type not in ("MatMul", "Gemm") or attributes.get_int("transA", 0) == 1:
        return None
    if {attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)} != {1.0}:
        return None
    rows = 1 - attributes.get_int("transB", 0)  # the weight's axis of outputs
    codes, weight = find_activation_codes(node.inputs[0]), find_weight_codes(node.inputs[1], axis=rows)
    if codes is None or weight is None or len(get_shape(weight)) != 2 or not has_plain_bias(node, weight, rows):
        return None
    bias = read_bias(node, weight, rows)
    scale = expand_per_channel(read_scale(node.inputs[0]) * read_scale(node.inputs[1]), weight, rows)
    stored = tensor_from_value(weight)
    compute = Int8Linear([stored if rows == 0 else stored.T], [scale], bias, get_output_type(node))
    return make_product_step(node, codes, weight, compute)


def make_product_step(node: ir.Node, codes: ir.Value, weight: ir.Value, compute: torch.nn.Module) -> GraphStep:
    """The step of ``node`` that reads int8 ``codes``; ``compute`` holds the codes of ``weight``."""
    names, constants = (node.name or "",), (get_name(weight),)
    return GraphStep(
        f"Int8{node.op_type}", names, (get_name(codes),), get_output_names(node), compute, constants, integer=True
    )


def merge_linear_steps(steps: list[GraphStep]) -> list[GraphStep]:
    """Linear products of the same codes as one: an attention's to_q, to_k and to_v."""
    groups: dict[str, list[GraphStep]] = {}
    for step in steps:
        if isinstance(step.compute, Int8Linear) and step.compute.bias is None:
            groups.setdefault(step.inputs[0], []).append(step)
    merged = {group[0].outputs: merge_group(group) for group in groups.values()}
    absorbed = {step.outputs for group in groups.values() for step in group[1:]}
    return [merged.get(step.outputs, step) for step in steps if step.outputs not in absorbed]


def merge_group(group: list[GraphStep]) -> GraphStep:
    """One step with the outputs of all in ``group``: linear products without bias that read the same codes."""
    layers: list[Int8Linear] = [step.compute for step in group]  # type: ignore[misc]
    weights, scales = [layer.weight[:, 0, 0] for layer in layers], [layer.scale for layer in layers]
    return GraphStep(
        group[0].op_type,
        tuple(name for step in group for name in step.names),
        group[0].inputs,
        tuple(name for step in group for name in step.outputs),
        Int8Linear(weights, scales, None, layers[0].dtype),
        tuple(name for step in group for name in step.constants),
        integer=True,
    )


def match_attention(node: ir.Node) -> GraphStep | None:
    """MatMul(Softmax(MatMul(q scale, k transposed) [+ mask]), v), as ``expand_attention`` writes it."""
    softmax = find_producer(node, 0, "Softmax") if node.op_type == "MatMul" else None
    if softmax is None or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    masked = find_producer(softmax, 0, "Add")
    scores = find_producer(masked, 0, "MatMul") if masked is not None else find_producer(softmax, 0, "MatMul")
    scaled, transposed = (
        (None, None) if scores is None else (find_producer(scores, 0, "Mul"), find_producer(scores, 1, "Transpose"))
    )
    if scaled is None or transposed is None or tuple(transposed.attributes.get_ints("perm", ())) != KEYS_LAST:
        return None
    factor = read_constant(scaled.inputs[1])
    if factor is None or factor.size != 1:
        return None
    scale = float(factor)

    def compute(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask[0].to(q.dtype) if mask else None, scale=scale)

    read = [scaled.inputs[0], transposed.inputs[0], node.inputs[1], *([] if masked is None else [masked.inputs[1]])]
    return GraphStep("Attention", (node.name or "",), tuple(map(get_name, read)), get_output_names(node), compute)


def match_group_norm(node: ir.Node) -> GraphStep | None:
    """Reshape to groups - InstanceNormalization by 1 and 0 - Reshape back - Mul - Add, of the parameters' constants."""
    scaled = find_producer(node, 0, "Mul") if node.op_type == "Add" else None
    back = None if scaled is None else find_producer(scaled, 0, "Reshape")
    norm = None if back is None else find_producer(back, 0, "InstanceNormalization")
    split = None if norm is None else find_producer(norm, 0, "Reshape")
    if split is None or norm is None or scaled is None or back is None:
        return None
    ones, zeros, weight, bias = (
        read_constant(value) for value in (*norm.inputs[1:3], scaled.inputs[1], node.inputs[1])
    )
    shape, grouped = back.outputs[0].shape, split.outputs[0].shape
    if ones is None or zeros is None or weight is None or bias is None or shape is None or grouped is None:
        return None
    if not (np.all(ones == 1) and np.all(zeros == 0) and shape[1] == weight.size == bias.size):
        return None
    if len(grouped) != 3 or (grouped[0], grouped[1]) != (shape[0], ones.size):
        return None
    groups, epsilon = ones.size, norm.attributes.get_float("epsilon", 1e-5)

    def compute(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, groups, weight.reshape(-1), bias.reshape(-1), epsilon)

    read = (split.inputs[0], scaled.inputs[1], node.inputs[1])
    return GraphStep("GroupNorm", (node.name or "",), tuple(map(get_name, read)), get_output_names(node), compute)


def find_producer(node: ir.Node, index: int, op_type: str) -> ir.Node | None:
    """What computes an input of ``node``, if it is an ``op_type``."""
    value = node.inputs[index]
    node_found = None if value is None else value.producer()
    return node_found if node_found is not None and node_found.op_type == op_type else None


def find_activation_codes(value: ir.Value | None) -> ir.Value | None:
    """The int8 codes of an activation's DequantizeLinear, if they are around 0 and have one scale."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or read_constant(node.inputs[0]) is not None:
        return None
    zero, scale = read_constant(node.inputs[2]) if has_input(node, 2) else None, read_constant(node.inputs[1])
    signed = zero is not None and zero.dtype == np.int8 and not zero.any()
    return node.inputs[0] if signed and scale is not None and scale.size == 1 else None


def find_weight_codes(value: ir.Value | None, axis: int) -> ir.Value | None:
    """The int8 codes of a weight's DequantizeLinear, around 0 with one scale or one for each index of ``axis``."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    codes, scale = read_constant(node.inputs[0]), read_constant(node.inputs[1])
    zero = read_constant(node.inputs[2]) if has_input(node, 2) else None
    if codes is None or codes.dtype != np.int8 or scale is None or (zero is not None and zero.any()):
        return None
    along = node.attributes.get_int("axis", 1) % codes.ndim
    return node.inputs[0] if scale.size == 1 or along == axis else None


def read_scale(value: ir.Value | None) -> torch.Tensor:
    """The scale of the DequantizeLinear that gives ``value``: ``float32[]`` or ``float32[C]``."""
    assert value is not None
    node = value.producer()
    assert node is not None
    return tensor_from_value(node.inputs[1]).float()


def has_plain_bias(node: ir.Node, weight: ir.Value, axis: int) -> bool:
    """Whether the layer's bias is missing, or a constant of one value or one for each output channel."""
    if not has_input(node, 2):
        return True
    bias = read_constant(node.inputs[2])
    return bias is not None and (bias.size == 1 or (bias.shape[-1], bias.size) == (get_shape(weight)[axis],) * 2)


def read_bias(node: ir.Node, weight: ir.Value, axis: int) -> torch.Tensor | None:
    """``[OUT]``, for outputs along ``axis`` of ``weight``; None without one."""
    return expand_per_channel(tensor_from_value(node.inputs[2]), weight, axis) if has_input(node, 2) else None


def expand_per_channel(scale: torch.Tensor, weight: ir.Value, axis: int) -> torch.Tensor:
    """One value for each output channel."""
    return scale.reshape(-1).expand(get_shape(weight)[axis]).contiguous()


def get_shape(weight: ir.Value) -> tuple[int, ...]:
    """Of the constant ``weight``, taken from its values."""
    values = read_constant(weight)
    assert values is not None
    return values.shape


def get_output_type(node: ir.Node) -> torch.dtype:
    """The type of the layer's output, which is that of its weight's scale."""
    value = node.inputs[1]
    assert value is not None
    dequantizer = value.producer()
    assert dequantizer is not None
    scale = dequantizer.inputs[1]
    assert scale is not None
    assert scale.dtype is not None
    return TORCH_TYPES[scale.dtype]
