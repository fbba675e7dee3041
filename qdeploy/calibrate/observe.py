"""Two passes over the calibration set: per-channel statistics first, then histograms of what is quantized.

The second pass needs the first: it looks at activations after equalization, in the very form that
the quantizer will see them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qdeploy.calibrate.dataset import CalibrationSet, batch_rows, rows_of
from qdeploy.calibrate.ranges import StreamingHistogram
from qdeploy.errors import CalibrationError
from qdeploy.models.components import Component, LayerCall
from qdeploy.progress import OnProgress
from qdeploy.simulate.layers import is_pointwise
from qdeploy.simulate.ops import along

Watch = Callable[[LayerCall, Tensor, Tensor], None]  # (layer, its input, its output)


@dataclass
class ChannelStats:
    """Extremes and power of each channel, summed over all data; float32[C] each once data has come."""

    low: Tensor = field(default_factory=lambda: torch.empty(0))
    high: Tensor = field(default_factory=lambda: torch.empty(0))
    square_sum: Tensor = field(default_factory=lambda: torch.empty(0))
    count: int = 0

    def add(self, values: Tensor, axis: int) -> None:
        """Take in ``values``, channels on ``axis``."""
        low, high, square_sum = reduced(values, axis)
        if self.count:
            low, high, square_sum = (
                torch.minimum(self.low, low), torch.maximum(self.high, high), self.square_sum + square_sum,
            )  # fmt: skip
        self.low, self.high, self.square_sum = low, high, square_sum
        self.count += values.numel() // values.shape[axis]

    @property
    def power(self) -> Tensor:
        """Mean square of each channel."""
        return self.square_sum / self.count

    @property
    def absmax(self) -> Tensor:
        return torch.maximum(self.low.abs(), self.high.abs())


def reduced(values: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Least, greatest and sum of squares of each channel (amin and amax are 10 times faster here than aminmax)."""
    if axis == values.dim() - 1:
        rows = values.reshape(-1, values.shape[-1])
        return rows.amin(dim=0), rows.amax(dim=0), (rows * rows).sum(dim=0)
    flat = values.flatten(2)  # [B, C, h*w]
    return flat.amin(dim=2).amin(dim=0), flat.amax(dim=2).amax(dim=0), (flat * flat).sum(dim=2).sum(dim=0)


def channel_axis(layer: nn.Module, values: Tensor) -> int:
    """Where a layer's channels lie: 1 for a Conv, last for a Linear."""
    return 1 if isinstance(layer, nn.Conv2d) else values.dim() - 1


def quantized_part(call: LayerCall, x: Tensor) -> Tensor:
    """What the layer's quantizer will see of its input: all, or ``[B, T, C]`` without a float first token."""
    return x[:, 1:] if call.first_token_float else x


def needs_output_range(layer: nn.Module) -> bool:
    """Only spatial convolutions do, and only on engines that need Q behind them."""
    return isinstance(layer, nn.Conv2d) and not is_pointwise(layer)


def channel_stats(
    component: Component, calls: Sequence[LayerCall], calibration: CalibrationSet, name: str, on_progress: OnProgress
) -> tuple[dict[str, ChannelStats], dict[str, ChannelStats]]:
    """First pass: statistics of each layer's input, and of a spatial Conv's output."""
    inputs = {call.name: ChannelStats() for call in calls}
    outputs = {call.name: ChannelStats() for call in calls if needs_output_range(call.module)}

    def watch(call: LayerCall, x: Tensor, y: Tensor) -> None:
        inputs[call.name].add(quantized_part(call, x), channel_axis(call.module, x))
        if call.name in outputs:
            outputs[call.name].add(y, 1)

    run_watched(component, calls, calibration, name, watch, on_progress, f"{name}: channels")
    check_stats(inputs, name)
    check_stats(outputs, name)
    return inputs, outputs


def histograms(
    component: Component,
    calls: Sequence[LayerCall],
    calibration: CalibrationSet,
    name: str,
    normalize_input: Mapping[str, Tensor | None],
    normalize_output: Mapping[str, tuple[Tensor, Tensor]],
    on_progress: OnProgress,
) -> tuple[dict[str, StreamingHistogram], dict[str, StreamingHistogram]]:
    """Second pass: histograms of ``x / ratio`` and of ``(y - center) / ratio``."""
    inputs = {call.name: StreamingHistogram() for call in calls}
    outputs = {layer: StreamingHistogram() for layer in normalize_output}

    def watch(call: LayerCall, x: Tensor, y: Tensor) -> None:
        ratio = normalize_input.get(call.name)
        x = quantized_part(call, x)
        inputs[call.name].add(x if ratio is None else x / along(ratio, x, channel_axis(call.module, x)))
        if call.name in outputs:
            center, spread = normalize_output[call.name]
            outputs[call.name].add((y - along(center, y, 1)) / along(spread, y, 1))

    run_watched(component, calls, calibration, name, watch, on_progress, f"{name}: ranges")
    return inputs, outputs


def run_watched(
    component: Component,
    calls: Sequence[LayerCall],
    calibration: CalibrationSet,
    name: str,
    watch: Watch,
    on_progress: OnProgress,
    what: str,
) -> None:
    """Run ``component`` over the whole set, showing ``watch`` every call of ``calls``."""
    done, total = 0, calibration.count(name)
    with watched(calls, watch), torch.no_grad():
        for feeds in calibration.batches(name, batch_rows(calibration, name)):
            component(**feeds)
            done += rows_of(feeds)
            on_progress(what, done, total)


@contextmanager
def watched(calls: Sequence[LayerCall], watch: Watch) -> Iterator[None]:
    """Hook ``watch`` onto the layers."""
    handles = [
        call.module.register_forward_hook(lambda _, args, output, call=call: watch(call, args[0], output))
        for call in calls
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sharing_groups(component: Component, calls: Sequence[LayerCall], feeds: dict[str, Tensor]) -> list[list[LayerCall]]:
    """Layers of one parent that read the very same tensor (Q, K, V): they will share one QuantizeLinear."""
    groups: dict[tuple[int, str], list[LayerCall]] = {}
    alive: list[Tensor] = []  # keeps ids unique

    def watch(call: LayerCall, x: Tensor, _: Tensor) -> None:
        alive.append(x)
        groups.setdefault((id(x), call.name.rpartition(".")[0]), []).append(call)

    with watched(calls, watch), torch.no_grad():
        component(**feeds)
    return list(groups.values())


def check_stats(stats: Mapping[str, ChannelStats], component: str) -> None:
    """CalibrationError that names a layer which was never reached, or saw NaN, infinity or nothing but one constant."""
    for layer, seen in stats.items():
        if seen.count == 0:
            raise CalibrationError(
                f"{component}: layer {layer} was never reached by the calibration data; keep it in float or calibrate "
                "with data that uses it"
            )
        if not (torch.isfinite(seen.low).all() and torch.isfinite(seen.high).all()):
            raise CalibrationError(
                f"{component}: an activation of layer {layer} became NaN or infinite while calibrating; "
                "the model or the calibration data is broken"
            )
        if bool((seen.low == 0).all() and (seen.high == 0).all()):
            raise CalibrationError(
                f"{component}: the activation of layer {layer} is zero in all calibration data, so it has no range; "
                "keep the layer in float (--keep-float) or calibrate with more varied data"
            )
