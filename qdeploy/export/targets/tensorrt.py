"""Lowering for TensorRT: explicit QDQ in its strongly typed form, fp16 wherever nothing is quantized.

Codes around 0, float biases and convolutions without Q behind them come from the simulated modules, as
``spec.TARGETS`` says. Weights of 4 bits stay INT8: TensorRT reads INT4 for weight-only products alone.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qdeploy.engines.nvidia.graph_inputs import is_static
from qdeploy.engines.nvidia.profiles import profile_for
from qdeploy.errors import EngineUnavailableError
from qdeploy.export.passes.expand_attention import expand_attention
from qdeploy.export.passes.fold_ratio import fold_ratio
from qdeploy.export.passes.name_by_layer import name_by_layer
from qdeploy.export.passes.share_quantize import share_quantize
from qdeploy.export.passes.to_fp16 import to_fp16
from qdeploy.export.tensorrt_rtx import accept
from qdeploy.export.tensorrt_rules import check_rules


def lower(model: ir.Model) -> None:
    """Lower ``model`` in place."""
    expand_attention(model)
    name_by_layer(model)
    share_quantize(model)
    fold_ratio(model)
    to_fp16(model)


def check(path: Path, component: str) -> str:
    """The rules on the file, then TensorRT's own library where it is installed; AuditError when either refuses."""
    is_open = not is_static(path)
    if is_open:
        profile_for(path)
    check_rules(ir.load(path), component, has_profile=is_open)
    if is_open:
        return "not built on trial: its sizes are open"
    try:
        return f"built by {accept(path).library}"
    except EngineUnavailableError as exc:
        return f"not built on trial: {exc}"
