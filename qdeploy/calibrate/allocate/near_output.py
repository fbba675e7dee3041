"""Convolutions near the UNet's output that get more precision by where they stand, without a measurement.

Most of the noise of the last steps, where a picture gets its fine grain, is made by the last convolutions, those that
write the latents' full size, and half of it by the one that reads the last skip connection
(docs/design/sensitivity.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from torch import nn

from qdeploy.calibrate.ranges.observe import needs_output_range
from qdeploy.models.components import LayerCall


def find_full_size(calls: Sequence[LayerCall]) -> frozenset[str]:
    """The spatial convolutions at the end of ``calls`` that write the largest size: their results stay in float."""
    spatial = [call for call in calls if is_spatial(call.module)]
    largest = max(map(count_positions, spatial), default=0)
    at_end = takewhile(lambda call: count_positions(call) == largest, reversed(spatial))
    return frozenset(call.name for call in at_end)


def find_last_merge(groups: Sequence[Sequence[LayerCall]], calls: Sequence[LayerCall]) -> frozenset[str]:
    """The last spatial convolution but one, a UNet's last to read a skip connection: its input is read in two passes.

    groups: of ``calls``, layers that read one tensor; none where it shares its input.
    """
    spatial = [call.name for call in calls if is_spatial(call.module)]
    return frozenset(group[0].name for group in groups if len(group) == 1 and group[0].name in spatial[-2:-1])


def is_spatial(module: nn.Module) -> bool:
    """Whether it is a convolution over a neighbourhood, in one group."""
    return isinstance(module, nn.Conv2d) and needs_output_range(module) and module.groups == 1


def count_positions(call: LayerCall) -> int:
    """Positions that a convolution writes, batch included."""
    return call.macs // call.module.weight.numel()
