"""Record each unit's inputs in the simulator and its outputs in the float model to disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qdeploy.calibrate.dataset import Feeds, count_rows
from qdeploy.calibrate.rounding.cache import Call, CallCache, RowCache
from qdeploy.calibrate.rounding.units import Unit
from qdeploy.models.components import TorchComponent


def record_unit_inputs(simulator: TorchComponent, unit: Unit, feeds: Sequence[Feeds], scratch: Path) -> CallCache:
    """The unit's inputs in the simulator, over all feeds."""
    inputs = CallCache(scratch)
    for feed in feeds:
        inputs.append(*capture_inputs(simulator, unit.name, feed), count_rows(feed))
    return inputs


class UnitTargets:
    """Float outputs of the units, recorded for as many units a pass as the byte budget allows."""

    def __init__(
        self, component: TorchComponent, units: Sequence[Unit], feeds: Sequence[Feeds], budget_gb: float, folder: Path
    ) -> None:
        self._component, self._units, self._feeds = component, units, feeds
        self._budget = budget_gb * 1e9
        self._folder = folder
        self._rows: dict[int, RowCache] = {}

    def get(self, number: int) -> RowCache:
        """Outputs ``[N, ...]`` of unit ``number`` over all feeds."""
        if number not in self._rows:
            self._record(number)
        return self._rows[number]

    def drop(self, number: int) -> None:
        """Delete the file of a unit whose outputs are not read again."""
        self._rows.pop(number).remove()

    def _record(self, first: int) -> None:
        last = self._find_last(first)
        numbers = range(first, last + 1)
        self._rows = {number: RowCache(self._folder / f"target-{number}") for number in numbers}
        for feed in self._feeds:
            for number, output in zip(numbers, self._compute_outputs(numbers, feed), strict=True):
                self._rows[number].append(output)

    def _find_last(self, first: int) -> int:
        numbers = range(first, len(self._units))
        rows = sum(map(count_rows, self._feeds))
        spent = 0.0
        for number, output in zip(numbers, self._compute_outputs(numbers, self._feeds[0]), strict=True):
            spent += 2 * output[0].numel() * rows
            if spent > self._budget:
                return max(first, number - 1)
        return numbers[-1]

    def _compute_outputs(self, numbers: Sequence[int], feed: Feeds) -> list[Tensor]:
        outputs: dict[int, Tensor] = {}
        handles = [
            self._component.inner.get_submodule(self._units[number].name).register_forward_hook(
                lambda _, __, output, number=number: record_and_stop(outputs, number, first_tensor(output), numbers[-1])
            )
            for number in numbers
        ]
        run_until_stopped(self._component, feed, handles)
        return [outputs[number] for number in numbers]


def capture_inputs(component: TorchComponent, unit: str, feed: Feeds) -> Call:
    """Arguments with which ``unit`` is called in a forward pass, which ends there."""
    captured: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append((args, kwargs))
        raise StopForward

    handle = component.inner.get_submodule(unit).register_forward_pre_hook(hook, with_kwargs=True)
    run_until_stopped(component, feed, [handle])
    return captured[0]


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Raised in a hook: the rest of the forward pass is not needed."""


def record_and_stop(outputs: dict[int, Tensor], number: int, output: Tensor, last: int) -> None:
    """Keep ``output`` by its unit's number; StopForward after unit ``last``."""
    outputs[number] = output
    if number == last:
        raise StopForward


def run_until_stopped(component: TorchComponent, feed: Feeds, handles: Sequence[RemovableHandle]) -> None:
    """Run ``component`` until a hook raises StopForward, then remove the hooks ``handles``."""
    try:
        with torch.no_grad():
            component(**feed)
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output of a block that may return others with it, as transformer blocks do."""
    return output if isinstance(output, Tensor) else output[0]
