"""What each unit is called with in the quantized twin, and what it puts out in the float model, recorded to disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qdeploy.calibrate.cache import CallCache, Rows
from qdeploy.calibrate.dataset import Feeds, rows_of
from qdeploy.calibrate.units import Unit
from qdeploy.models.components import Component


def unit_inputs(twin: Component, unit: Unit, feeds: Sequence[Feeds], scratch: Path) -> CallCache:
    """What the unit is called with in the quantized twin, over all feeds."""
    inputs = CallCache(scratch)
    for feed in feeds:
        inputs.append(*inputs_of(twin, unit.name, feed), rows_of(feed))
    return inputs


class Targets:
    """Float outputs of the units, recorded for as many units a pass as the byte budget allows."""

    def __init__(
        self, component: Component, units: Sequence[Unit], feeds: Sequence[Feeds], budget_gb: float, folder: Path
    ) -> None:
        self._component, self._units, self._feeds = component, units, feeds
        self._budget = budget_gb * 1e9
        self._folder = folder
        self._rows: dict[int, Rows] = {}

    def of(self, number: int) -> Rows:
        """Outputs ``[N, ...]`` of unit ``number`` over all feeds."""
        if number not in self._rows:
            self._record(number)
        return self._rows[number]

    def drop(self, number: int) -> None:
        self._rows.pop(number).remove()

    def _record(self, first: int) -> None:
        last = self._last_that_fits(first)
        numbers = range(first, last + 1)
        self._rows = {number: Rows(self._folder / f"target-{number}") for number in numbers}
        for feed in self._feeds:
            for number, output in zip(numbers, self._outputs(numbers, feed), strict=True):
                self._rows[number].append(output)

    def _last_that_fits(self, first: int) -> int:
        numbers = range(first, len(self._units))
        rows = sum(map(rows_of, self._feeds))
        spent = 0.0
        for number, output in zip(numbers, self._outputs(numbers, self._feeds[0]), strict=True):
            spent += 2 * output[0].numel() * rows
            if spent > self._budget:
                return max(first, number - 1)
        return numbers[-1]

    def _outputs(self, numbers: Sequence[int], feed: Feeds) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        handles = [
            self._component.inner.get_submodule(self._units[number].name).register_forward_hook(
                lambda _, __, output, number=number: stop_after(found, number, first_tensor(output), numbers[-1])
            )
            for number in numbers
        ]
        run_until_stopped(self._component, feed, handles)
        return [found[number] for number in numbers]


def inputs_of(component: Component, unit: str, feed: Feeds) -> tuple[tuple, dict]:
    """Arguments with which ``unit`` is called in a forward pass, which ends there."""
    seen: list[tuple[tuple, dict]] = []

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args, kwargs))
        raise Stop

    handle = component.inner.get_submodule(unit).register_forward_pre_hook(hook, with_kwargs=True)
    run_until_stopped(component, feed, [handle])
    return seen[0]


class Stop(Exception):  # noqa: N818 - control flow, not an error
    """Raised in a hook: the rest of the forward pass is not needed."""


def stop_after(found: dict[int, Tensor], number: int, output: Tensor, last: int) -> None:
    found[number] = output
    if number == last:
        raise Stop


def run_until_stopped(component: Component, feed: Feeds, handles: Sequence) -> None:
    try:
        with torch.no_grad():
            component(**feed)
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Tensor | tuple) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
