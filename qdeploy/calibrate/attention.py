"""Ranges of queries, keys and values over the calibration set, for quantized attention products."""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from torch import Tensor

from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.observe import run_watched
from qdeploy.calibrate.ranges import StreamingHistogram, affine_of
from qdeploy.models.components import Component, LayerCall
from qdeploy.progress import OnProgress
from qdeploy.spec import QuantSpec
from qdeploy.table import AttentionQuant

PARTS = ("q", "k", "v")


def attention_ranges(
    component: Component, calibration: CalibrationSet, name: str, spec: QuantSpec, on_progress: OnProgress
) -> dict[str, AttentionQuant]:
    """Quantization of each diffusers ``Attention`` of ``component`` (float) that the calibration data reaches.

    Other attention, such as a CLIP text encoder's, stays in float.
    """
    seen: dict[str, StreamingHistogram] = {}

    def watch(call: LayerCall, _: Tensor, y: Tensor) -> None:
        seen.setdefault(call.name, StreamingHistogram()).add(y)

    attentions = {path: module for path, module in component.inner.named_modules() if isinstance(module, Attention)}
    if not attentions:
        return {}
    calls = [call for path, module in attentions.items() for call in operands(path, module)]
    run_watched(component, calls, calibration, name, watch, on_progress, f"{name}: attention")
    observer = "minmax" if spec.attention_bits == 16 else spec.observer  # fine steps leave clipping the only error
    return {
        path: AttentionQuant(*(affine_of(seen[f"{path}.{part}"], observer, spec.attention_bits) for part in PARTS))
        for path in attentions
        if f"{path}.q" in seen
    }


def operands(path: str, attention: Attention) -> list[LayerCall]:
    """The modules that put out q, k and v just as they are multiplied: a norm where there is one."""
    modules = (attention.norm_q or attention.to_q, attention.norm_k or attention.to_k, attention.to_v)
    return [LayerCall(f"{path}.{part}", module, 0) for part, module in zip(PARTS, modules, strict=True)]  # type: ignore[arg-type]
