"""Ranges of queries, keys and values over the calibration set, for quantized attention products."""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from torch import Tensor

from qdeploy.artifacts.table import AttentionQuant
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.ranges.histogram import StreamingHistogram, affine_from_histogram
from qdeploy.calibrate.ranges.observe import run_with_hook
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.models.components import LayerCall

PARTS = ("q", "k", "v")


def observe_attention(component: CalibratedComponent, spec: QuantSpec) -> dict[str, AttentionQuant]:
    """Quantization of each diffusers ``Attention`` of ``component`` (float) that the calibration data reaches.

    Other attention, such as a CLIP text encoder's, stays in float.
    """
    histograms: dict[str, StreamingHistogram] = {}

    def record(call: LayerCall, _: Tensor, y: Tensor) -> None:
        histograms.setdefault(call.name, StreamingHistogram()).add(y)

    attentions = {
        path: module for path, module in component.module.inner.named_modules() if isinstance(module, Attention)
    }
    if not attentions:
        return {}
    calls = [call for path, module in attentions.items() for call in list_operands(path, module)]
    run_with_hook(component, calls, record, "attention")
    observer = "minmax" if spec.attention_bits == 16 else spec.observer  # fine steps leave clipping the only error
    return {
        path: AttentionQuant(
            *(affine_from_histogram(histograms[f"{path}.{part}"], observer, spec.attention_bits) for part in PARTS)
        )
        for path in attentions
        if f"{path}.q" in histograms
    }


def list_operands(path: str, attention: Attention) -> list[LayerCall]:
    """The modules whose outputs are q, k and v as they are multiplied: a norm where there is one."""
    modules = (attention.norm_q or attention.to_q, attention.norm_k or attention.to_k, attention.to_v)
    return [LayerCall(f"{path}.{part}", module, 0) for part, module in zip(PARTS, modules, strict=True)]  # type: ignore[arg-type]
