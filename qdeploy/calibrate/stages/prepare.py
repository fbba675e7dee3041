"""Stage 1 of quantizing: rewrite the component's float copy, decide each layer's fate, refuse what cannot work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qdeploy.artifacts.components import UNET, get_kind
from qdeploy.base.errors import UsageError
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.calibrate.allocate.knapsack import WIDTHS, check_budget
from qdeploy.calibrate.allocate.near_output import find_full_size, find_last_merge
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.dataset import CalibrationSet, Feeds
from qdeploy.calibrate.ranges.observe import group_by_input
from qdeploy.calibrate.spec import READ_TEXT, QuantSpec
from qdeploy.models.components import LayerCall, trace_layers
from qdeploy.models.rewrites import apply_rewrite, copy_module
from qdeploy.models.source import LatentDiffusion

TIMESTEP_TABLE = "timestep_table"


@dataclass(frozen=True)
class Prepared:
    """A component ready to be quantized.

    rewrites: that the table will name; made on the component's copy, but for those that change no quantized layer.
    groups: of ``quantized_calls``, layers that read one tensor.
    widths: weight bits to round to; of several, each layer gets one.
    two_passes: names of layers whose input is read in two passes.
    float_outputs: names of convolutions whose results no engine rounds.
    """

    component: CalibratedComponent
    rewrites: tuple[str, ...]
    quantized_calls: Sequence[LayerCall]
    float_calls: Sequence[LayerCall]
    groups: Sequence[Sequence[LayerCall]]
    widths: tuple[int, ...]
    two_passes: frozenset[str]
    float_outputs: frozenset[str]


def prepare(
    model: LatentDiffusion,
    name: str,
    calibration: CalibrationSet,
    spec: QuantSpec,
    on_progress: OnProgress = ignore_progress,
) -> Prepared:
    """Rewrite a copy of the component ``name`` as ``spec`` asks, and sort its layers into quantized and float ones."""
    in_loop = get_kind(name).in_loop  # only there are rewrites, a float first token and a budget
    module = copy_module(model.component(name))
    rewrites = spec.rewrites if in_loop else ()
    for rewrite in rewrites:
        if rewrite != TIMESTEP_TABLE:  # that one changes no quantized layer and is left to the export
            apply_rewrite(module, rewrite)
    feeds = model.make_example(name, batch=1)
    calls = trace_layers(module, feeds)
    float_names = {call.name for call in calls if call.name in module.edge_layers or spec.keeps_float(name, call.name)}
    float_calls = [call for call in calls if call.name in float_names]
    quantized_calls = [
        replace(call, first_token_float=spec.keeps_first_token_float(call.name))
        for call in calls
        if call.name not in float_names
    ]
    if in_loop and spec.first_token_float:
        check_first_token(quantized_calls, feeds)
    if in_loop and spec.max_mb is not None:
        check_budget([call.module.weight.shape for call in quantized_calls], spec.max_mb)
    groups = group_by_input(module, quantized_calls, feeds)
    two_passes = frozenset(call.name for call in quantized_calls if spec.takes_two_passes(name, call.name))
    precise_end = in_loop and spec.precise_end
    return Prepared(
        CalibratedComponent(name, module, calibration, on_progress),
        rewrites,
        quantized_calls,
        float_calls,
        groups=groups,
        widths=WIDTHS if in_loop and spec.max_mb is not None else (spec.weight_bits,),
        two_passes=two_passes | (find_last_merge(groups, quantized_calls) if precise_end else frozenset()),
        float_outputs=find_full_size(quantized_calls) if precise_end else frozenset(),
    )


def check_first_token(calls: Sequence[LayerCall], feeds: Feeds) -> None:
    """UsageError when no quantized layer reads a text of at least two tokens; ``feeds`` are a UNet's inputs."""
    context = feeds.get(UNET.inputs[2])  # float32[B, T, D]
    if context is None or context.shape[1] < 2 or not any(call.first_token_float for call in calls):
        raise UsageError(
            "the first token cannot stay in float: this UNet quantizes no cross-attention "
            f"({', '.join(READ_TEXT)}) over two or more tokens; leave out --first-token-float"
        )
