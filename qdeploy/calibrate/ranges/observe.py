"""Two runs over calibration inputs: per-channel statistics of some first, then histograms over all of them.

The second run needs the first: it looks at activations after equalization, as the quantizer
will see them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qdeploy.base.errors import CalibrationError
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.dataset import Feeds, count_rows
from qdeploy.calibrate.ranges.histogram import StreamingHistogram
from qdeploy.models.components import LayerCall, TorchComponent
from qdeploy.simulate.layers import is_pointwise
from qdeploy.simulate.ops import broadcast_along

LayerHook = Callable[[LayerCall, Tensor, Tensor], None]  # (layer, its input, its output)
KeepInput = Callable[[str, Tensor], None]  # (name of a layer, its input in float)
FEW_VALUES = 16  # of a channel in one input
CHANNEL_INPUTS = 16  # that channels are compared on; ranges are taken over all


@dataclass
class ChannelStats:
    """Each channel's extremes and power over inputs, rows of a batch; float32[C] each once data has come.

    Extremes are means over inputs: those of all inputs would be a few outliers', which clipping cuts off anyway. Where
    inputs have few values a channel, which say little of its extremes, they are those of all inputs after all.
    """

    low_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    high_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    power_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    least: Tensor = field(default_factory=lambda: torch.tensor(torch.inf))
    greatest: Tensor = field(default_factory=lambda: torch.tensor(-torch.inf))
    count: int = 0
    has_few: bool = False

    def add(self, values: Tensor, axis: int) -> None:
        """Add ``values``, inputs on axis 0 and channels on ``axis``."""
        low, high, power = reduce_channels(values, axis)
        self.least, self.greatest = (
            torch.minimum(self.least, low.amin(dim=0)),
            torch.maximum(self.greatest, high.amax(dim=0)),
        )
        self.low_sum, self.high_sum = self.low_sum + low.sum(dim=0), self.high_sum + high.sum(dim=0)
        self.power_sum = self.power_sum + power.sum(dim=0)
        self.count += len(values)
        self.has_few |= values.numel() < FEW_VALUES * low.numel()

    @property
    def low(self) -> Tensor:
        """The least values, ``float32[C]``."""
        return self.least if self.has_few else self.low_sum / self.count

    @property
    def high(self) -> Tensor:
        """The greatest values, ``float32[C]``."""
        return self.greatest if self.has_few else self.high_sum / self.count

    @property
    def power(self) -> Tensor:
        """Mean square of each channel, ``float32[C]``."""
        return self.power_sum / self.count


def reduce_channels(values: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Least, greatest and mean square of each input, ``[B, C]`` (amin and amax are 10 times faster than aminmax)."""
    if axis == values.dim() - 1:
        flat, over = values.reshape(len(values), -1, values.shape[-1]), 1  # [B, T, C]
    else:
        flat, over = values.flatten(2), 2  # [B, C, h*w]
    return flat.amin(dim=over), flat.amax(dim=over), (flat * flat).mean(dim=over)


def channel_axis(layer: nn.Module, values: Tensor) -> int:
    """The axis of a layer's channels: 1 for a Conv, last for a Linear."""
    return 1 if isinstance(layer, nn.Conv2d) else values.dim() - 1


def select_quantized(call: LayerCall, x: Tensor) -> Tensor:
    """What the layer's quantizer will see of its input: all, or ``[B, T, C]`` without a float first token."""
    return x[:, 1:] if call.first_token_float else x


def needs_output_range(layer: nn.Module) -> bool:
    """Only spatial convolutions do, and only for engines that need Q after them."""
    return isinstance(layer, nn.Conv2d) and not is_pointwise(layer)


def observe_channels(
    component: CalibratedComponent, calls: Sequence[LayerCall], with_output: Collection[str]
) -> tuple[dict[str, ChannelStats], dict[str, ChannelStats]]:
    """First run, over CHANNEL_INPUTS inputs: statistics of each layer's input, and of the outputs of some."""
    inputs = {call.name: ChannelStats() for call in calls}
    outputs = {call.name: ChannelStats() for call in calls if call.name in with_output}

    def record(call: LayerCall, x: Tensor, y: Tensor) -> None:
        inputs[call.name].add(select_quantized(call, x), channel_axis(call.module, x))
        if call.name in outputs:
            outputs[call.name].add(y, 1)

    run_with_hook(component, calls, record, "channels", component.sample(CHANNEL_INPUTS))
    check_stats(inputs, component.name)
    check_stats(outputs, component.name)
    return inputs, outputs


def observe_histograms(
    component: CalibratedComponent,
    calls: Sequence[LayerCall],
    normalize_input: Mapping[str, Tensor | None],
    normalize_output: Mapping[str, tuple[Tensor, Tensor]],
    keep_input: KeepInput = lambda _layer, _x: None,
) -> tuple[dict[str, StreamingHistogram], dict[str, StreamingHistogram]]:
    """Second run: histograms of ``x / ratio`` and of ``(y - center) / ratio``; ``keep_input`` sees each x."""
    inputs = {call.name: StreamingHistogram() for call in calls}
    outputs = {layer: StreamingHistogram() for layer in normalize_output}

    def record(call: LayerCall, x: Tensor, y: Tensor) -> None:
        ratio = normalize_input.get(call.name)
        x = select_quantized(call, x)
        keep_input(call.name, x)
        inputs[call.name].add(x if ratio is None else x / broadcast_along(ratio, x, channel_axis(call.module, x)))
        if call.name in outputs:
            center, spread = normalize_output[call.name]
            outputs[call.name].add((y - broadcast_along(center, y, 1)) / broadcast_along(spread, y, 1))

    run_with_hook(component, calls, record, "ranges")
    return inputs, outputs


def run_with_hook(
    component: CalibratedComponent,
    calls: Sequence[LayerCall],
    hook: LayerHook,
    task: str,
    sample: Sequence[Feeds] | None = None,
) -> None:
    """Run ``component`` over ``sample``, or over all its inputs, and call ``hook`` on every call of ``calls``."""
    done, count = 0, component.count if sample is None else sum(map(count_rows, sample))
    with hook_layers(calls, hook), torch.no_grad():
        for feeds in component.batches() if sample is None else sample:
            component.module(**feeds)
            done += count_rows(feeds)
            component.report(task, done, count)


@contextmanager
def hook_layers(calls: Sequence[LayerCall], hook: LayerHook) -> Iterator[None]:
    """Register ``hook`` on the layers."""
    handles = [
        call.module.register_forward_hook(lambda _, args, output, call=call: hook(call, args[0], output))
        for call in calls
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def group_by_input(
    component: TorchComponent, calls: Sequence[LayerCall], feeds: dict[str, Tensor]
) -> list[list[LayerCall]]:
    """Layers of one parent that read the very same tensor (Q, K, V): they will share one QuantizeLinear."""
    groups: list[list[LayerCall]] = []
    latest: dict[str, tuple[weakref.ref[Tensor], list[LayerCall]]] = {}  # by parent; no activation is kept alive

    def record(call: LayerCall, x: Tensor, _: Tensor) -> None:
        parent = call.name.rpartition(".")[0]
        if parent not in latest or latest[parent][0]() is not x:
            latest[parent] = weakref.ref(x), []
            groups.append(latest[parent][1])
        latest[parent][1].append(call)

    with hook_layers(calls, record), torch.no_grad():
        component(**feeds)
    return groups


def check_stats(stats: Mapping[str, ChannelStats], component: str) -> None:
    """CalibrationError that names a layer which was never reached, or saw NaN, infinity or nothing but one constant."""
    for layer, channels in stats.items():
        if channels.count == 0:
            raise CalibrationError(
                f"{component}: layer {layer} was never reached by the calibration data; keep it in float or calibrate "
                "with data that uses it"
            )
        if not (torch.isfinite(channels.low).all() and torch.isfinite(channels.high).all()):
            raise CalibrationError(
                f"{component}: an activation of layer {layer} became NaN or infinite while calibrating; "
                "the model or the calibration data is broken"
            )
        if bool((channels.low == 0).all() and (channels.high == 0).all()):
            raise CalibrationError(
                f"{component}: the activation of layer {layer} is zero in all of {CHANNEL_INPUTS} calibration inputs, "
                "so it has no range; keep the layer in float (--keep-float) or calibrate with more varied data"
            )
