"""Lowering for TensorRT: explicit QDQ in its strongly typed form, fp16 wherever nothing is quantized.

Codes around 0, float biases and convolutions without Q after them come from the simulator, as
``targets.spec.TARGETS`` says. Weights of 4 bits stay INT8: TensorRT reads INT4 only for weight-only products.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qdeploy.base.errors import EngineUnavailableError
from qdeploy.engines.nvidia.graph_inputs import is_static
from qdeploy.engines.nvidia.profiles import read_profile
from qdeploy.export.passes.expand_attention import expand_attention
from qdeploy.export.passes.fold_ratio import fold_ratio
from qdeploy.export.passes.name_by_layer import name_by_layer
from qdeploy.export.passes.share_quantize import share_quantize
from qdeploy.export.passes.to_fp16 import to_fp16
from qdeploy.export.tensorrt_rules import check_rules
from qdeploy.export.trial_build import build_on_trial


def lower(model: ir.Model) -> None:
    """Lower ``model`` in place."""
    expand_attention(model)
    name_by_layer(model)
    share_quantize(model)
    fold_ratio(model)
    to_fp16(model)


def check(path: Path, component: str) -> str:
    """Check the rules, then build with TensorRT's own library where it is installed; AuditError on a refusal."""
    is_open = not is_static(path)
    if is_open:
        read_profile(path)
    check_rules(ir.load(path), component, has_profile=is_open)
    if is_open:
        return "not built on trial: its sizes are open"
    try:
        return f"built by {build_on_trial(path).library}"
    except EngineUnavailableError as exc:
        return f"not built on trial: {exc}"
