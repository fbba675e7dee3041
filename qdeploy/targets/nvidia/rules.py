"""TensorRT's rules for an explicitly quantized graph, checked on the file; ``trial_build`` runs its library.

Source: TensorRT's developer guide, "Working with Quantized Types", and its ONNX parser's refusals.

1. One size, so that the only optimization profile is min = opt = max = that size; or a profile next to the file.
2. Opset 19 or later, whose Q and DQ take fp16 scales; strong typing gives DQ's output the type of its scale.
3. Codes are INT8, every zero point is 0, every scale finite and above 0.
4. Activations have one scale; a weight's codes reach DequantizeLinear straight from the file (no Clip, no Cast).
5. The bias of a Conv or Gemm comes from the file in float, not by DequantizeLinear.
6. No Q or DQ between Pad and Conv.
7. fp16 constants are finite.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qdeploy.base.errors import AuditError, join_names

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
FIRST_OPSET = 19
LAYERS_WITH_BIAS = ("Conv", "Gemm")


def check_rules(model: ir.Model, component: str, has_profile: bool = False) -> None:
    """AuditError that names the nodes that break a rule."""
    broken = list(find_broken_rules(model, has_profile))
    if broken:
        raise AuditError(
            f"{component}: TensorRT would refuse the graph or run it in float: {join_names(broken)}. Keep those layers "
            "in float (--keep-float), or report the graph pattern"
        )


def find_broken_rules(model: ir.Model, has_profile: bool = False) -> Iterator[str]:
    """One line for each rule violation."""
    for value in model.graph.inputs:
        if value.shape is None or 0 in value.shape or not (has_profile or value.shape.is_static()):
            yield f"input {value.name} has the open or empty shape {value.shape}, expected one size"
    if model.graph.opset_imports[""] < FIRST_OPSET:
        yield f"opset {model.graph.opset_imports['']}, expected {FIRST_OPSET} or later"
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT16 and not np.isfinite(get_array(value)).all():
            yield f"constant {value.name} is not finite in fp16"
    for node in model.graph:
        if node.op_type in QUANTIZERS:
            yield from find_quantizer_faults(node)
        if node.op_type in LAYERS_WITH_BIAS:
            yield from find_layer_faults(node)


def find_quantizer_faults(node: ir.Node) -> Iterator[str]:
    """Rules 3 and 4 on one QuantizeLinear or DequantizeLinear."""
    source, scale, zero_point = (*node.inputs, None)[:3]
    codes = node.outputs[0] if node.op_type == "QuantizeLinear" else source
    assert scale is not None
    assert source is not None
    if codes is None or codes.dtype != ir.DataType.INT8:
        yield f"{node.name}: codes are {None if codes is None else codes.dtype}, expected INT8"
    if zero_point is not None and (zero_point.const_value is None or np.any(get_array(zero_point))):
        yield f"{node.name}: zero point {zero_point.name} is not 0"
    if scale.const_value is None or not (np.isfinite(get_array(scale)) & (get_array(scale) > 0)).all():
        yield f"{node.name}: scale {scale.name} is no finite positive constant"
    from_file = node.op_type == "DequantizeLinear" and source.is_initializer()
    if not from_file and scale.const_value is not None and scale.const_value.size != 1:
        producer = "" if source.producer() is None else f" after {source.producer().op_type}"  # type: ignore[union-attr]
        yield f"{node.name}: a scale for each channel{producer}, expected one only for a weight's own codes"


def find_layer_faults(node: ir.Node) -> Iterator[str]:
    """Rules 5 and 6 on one Conv or Gemm."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not (bias.is_initializer() and bias.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)):
        yield f"{node.name}: bias {bias.name} is no float constant"
    value, between = node.inputs[0], False
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == "Pad" and between:
            yield f"{node.name}: Q or DQ between {producer.name or 'Pad'} and the convolution"
        if producer.op_type not in QUANTIZERS:
            break
        value, between = producer.inputs[0], True


def get_array(value: ir.Value) -> np.ndarray:
    """Of a value that is known to be a constant, in its own dtype."""
    assert value.const_value is not None
    return value.const_value.numpy()
