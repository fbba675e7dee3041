"""One torch component, float or quantized, to one ONNX graph; the simulator's ops become Q/DQ here."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator

import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from torch import Tensor

from qdeploy.errors import ExportError
from qdeploy.export.passes.simplify import simplify
from qdeploy.models.components import Component
from qdeploy.simulate import ops  # noqa: F401 - registers the custom ops that are translated below


def graph_from_component(component: Component, feeds: dict[str, Tensor], opset: int) -> ir.Model:
    """Trace ``component`` on ``feeds`` with static shapes; inputs and outputs carry their own names."""
    translations: dict[Callable, Callable] = {
        torch.ops.qdeploy.quantize_linear.default: _quantize_linear,
        torch.ops.qdeploy.dequantize_linear.default: _dequantize_linear,
        torch.ops.qdeploy.dequantize_weight.default: _dequantize_weight,
    }
    try:
        with _quiet():
            program = torch.onnx.export(
                component,
                kwargs=feeds,
                input_names=list(feeds),
                output_names=list(component.outputs),
                opset_version=opset,
                dynamo=True,
                custom_translation_table=translations,
                optimize=False,
                verbose=False,
            )
    except Exception as exc:  # torch.export raises many kinds
        raise ExportError(f"{type(component).__name__} could not be traced to ONNX: {exc}") from exc
    assert program is not None  # what export() returns unless it was told to write a file
    simplify(program.model)
    return program.model


def _quantize_linear(x, scale, zero_point):  # noqa: ANN001, ANN202 - traced by onnxscript
    return op.QuantizeLinear(x, scale, zero_point)


def _dequantize_linear(q, scale, zero_point):  # noqa: ANN001, ANN202
    return op.DequantizeLinear(q, scale, zero_point)


def _dequantize_weight(codes, scale, axis: int):  # noqa: ANN001, ANN202
    # No zero point: the exporter would share equal ones among layers, and ONNX Runtime 1.31's
    # s8-to-u8 weight conversion (CPUs without VNNI) fails on a shared one.
    return op.DequantizeLinear(codes, scale, axis=axis)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress prints and deprecation notes off the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
