"""One torch component, float or quantized, to one ONNX graph; the simulator's ops become Q/DQ here."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import opset20 as op
from onnxscript.values import Op, Opset
from torch import Tensor

from qdeploy.base.errors import ExportError
from qdeploy.export.open_dims import STATIC, OpenDims, name_dims
from qdeploy.models.components import TorchComponent
from qdeploy.models.half_weights import widen_layers
from qdeploy.models.rewrites.surgery import copy_module
from qdeploy.passes.expand_attention import ATTENTION, DOMAIN
from qdeploy.passes.simplify import simplify
from qdeploy.simulate import ops  # noqa: F401 - registers the custom ops that are translated below

# softmax(scale q k^T + mask) v as one node, of no engine's: each target's lowering replaces it with its fastest form
NEUTRAL_ATTENTION = Op(
    Opset(DOMAIN, 1),
    ATTENTION,
    OpSchema(
        ATTENTION,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(name, "T") for name in ("q", "k", "v", "mask")],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, "")],
    ),
)


def graph_from_component(
    component: TorchComponent, feeds: dict[str, Tensor], opset: int, open_dims: OpenDims = STATIC, multiple: int = 1
) -> ir.Model:
    """Trace ``component`` on ``feeds``, static except for ``open_dims``; inputs and outputs carry their own names.

    multiple: of which an open height or width is.
    """
    translations: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.qdeploy.quantize_linear.default: _quantize_linear,
        torch.ops.qdeploy.dequantize_linear.default: _dequantize_linear,
        torch.ops.qdeploy.dequantize_weight.default: _dequantize_weight,
        torch.ops.aten.scaled_dot_product_attention.default: _attention,
    }
    try:
        with _silence():
            program = torch.onnx.export(
                widen_layers(copy_module(component)),
                kwargs=feeds,
                input_names=list(feeds),
                output_names=list(component.outputs),
                opset_version=opset,
                dynamo=True,
                custom_translation_table=translations,
                optimize=False,
                verbose=False,
                dynamic_shapes=open_dims.to_dynamic_shapes(feeds, multiple),
            )
    except Exception as exc:  # torch.export raises many kinds
        raise ExportError(f"{type(component).__name__} could not be traced to ONNX: {exc}") from exc
    assert program is not None  # what export() returns unless it was told to write a file
    simplify(program.model)
    if open_dims:
        assert program.exported_program is not None
        name_dims(program.model, program.exported_program, feeds)
    return program.model


def _quantize_linear(x: Any, scale: Any, zero_point: Any) -> Any:  # onnxscript's symbolic values: untyped
    return op.QuantizeLinear(x, scale, zero_point)


def _dequantize_linear(q: Any, scale: Any, zero_point: Any) -> Any:
    return op.DequantizeLinear(q, scale, zero_point)


def _dequantize_weight(codes: Any, scale: Any, axis: int) -> Any:
    # No zero point: the exporter would share equal ones among layers, and ONNX Runtime 1.31's
    # s8-to-u8 weight conversion (CPUs without VNNI) fails on a shared one.
    return op.DequantizeLinear(codes, scale, axis=axis)


def _attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if is_causal or enable_gqa or dropout_p:
        raise NotImplementedError("attention with is_causal, grouped heads or dropout; pass an explicit mask")
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        mask = op.Where(mask, op.Constant(value_float=0.0), op.Constant(value_float=float("-inf")))  # type: ignore[type-var]
    return NEUTRAL_ATTENTION(q, k, v, mask, scale=factor)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the exporter's progress prints and deprecation notes."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
