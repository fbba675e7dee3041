"""Mixed precision by knapsack: which layers may cost more, so that the total noise is least within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qdeploy.artifacts.table import ComponentQuant, LayerQuant
from qdeploy.base.errors import UsageError

WIDTHS = (4, 8)  # weight bits that a size budget mixes
BUDGET_PIECES = 2000  # the budget is cut into this many pieces; costs are rounded up to them


@dataclass(frozen=True)
class Choice:
    """One way to run a layer: its share of the budget, and its noise power."""

    cost: float
    noise: float


def solve_knapsack(layers: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, int]:
    """For each layer the index of its choice: least summed noise with summed cost within ``budget``.

    Multiple-choice knapsack by dynamic programming over the budget. The first choice of every layer
    must be its cheapest; those together are always taken, whatever the budget.
    """
    unconstrained = {name: min(range(len(choices)), key=lambda i: choices[i].noise) for name, choices in layers.items()}
    if sum(layers[name][index].cost for name, index in unconstrained.items()) <= budget:
        return unconstrained  # nothing to weigh up, and no rounding of costs
    base = sum(choices[0].cost for choices in layers.values())
    room = max(0.0, budget - base)
    best = np.zeros(BUDGET_PIECES + 1)  # least noise by pieces spent at most
    picks: list[np.ndarray] = []
    for choices in layers.values():
        totals = np.full((len(choices), BUDGET_PIECES + 1), np.inf)
        for index, choice in enumerate(choices):
            pieces = _count_pieces(choice.cost - choices[0].cost, room)
            if pieces <= BUDGET_PIECES:
                totals[index, pieces:] = best[: BUDGET_PIECES + 1 - pieces] + choice.noise
        picks.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    return _trace_choices(layers, picks, room)


def _count_pieces(cost: float, room: float) -> int:
    if cost <= 0:
        return 0
    return BUDGET_PIECES + 1 if cost > room else int(np.ceil(cost / room * BUDGET_PIECES))


def _trace_choices(layers: Mapping[str, Sequence[Choice]], picks: Sequence[np.ndarray], room: float) -> dict[str, int]:
    chosen, left = {}, BUDGET_PIECES
    for (name, choices), pick in reversed(list(zip(layers.items(), picks, strict=True))):
        chosen[name] = int(pick[left])
        left -= _count_pieces(choices[chosen[name]].cost - choices[0].cost, room)
    return {name: chosen[name] for name in layers}


def noise_from_sqnr(sqnr_db: float) -> float:
    """Noise power relative to the signal's."""
    return 10 ** (-sqnr_db / 10)


def count_weight_bytes(codes: int, channels: int, bits: int) -> int:
    """Bytes of ``codes`` integer weights, two a byte up to 4 bits, with ``float32[channels]`` scales, as in a table."""
    return (codes + 1) // 2 + 4 * channels if bits <= 4 else codes + 4 * channels


def count_layer_bytes(layer: LayerQuant) -> int:
    """Bytes of one layer's integer weight and scales."""
    return count_weight_bytes(layer.weight.size, len(layer.weight_scale), layer.weight_bits)


def check_budget(shapes: Sequence[Sequence[int]], max_mb: float) -> None:
    """UsageError when weights of these ``[out, in, ...]`` shapes exceed ``max_mb`` (1e6 bytes) even at 4 bits."""
    min_bytes = sum(count_weight_bytes(int(np.prod(shape)), shape[0], min(WIDTHS)) for shape in shapes)
    if min_bytes > max_mb * 1e6:
        raise UsageError(
            f"--max-mb {max_mb:g}: the UNet's integer weights take {np.ceil(min_bytes / 1e3) / 1e3:.3f} MB even with "
            f"all of them at {min(WIDTHS)} bits; give that or more"
        )


def allocate_widths(narrow: ComponentQuant, wide: ComponentQuant, max_mb: float) -> ComponentQuant:
    """Each layer out of ``narrow`` or ``wide``: least summed noise within ``max_mb`` (1e6 bytes) of integer weights.

    Both hold the same layers and need their ``sensitivity_db``; the result has the figure of the width chosen.
    """
    ways = (narrow, wide)
    choices = {
        name: [Choice(count_layer_bytes(way.layers[name]), noise_from_sqnr(way.sensitivity_db[name])) for way in ways]
        for name in narrow.layers
    }
    chosen = solve_knapsack(choices, max_mb * 1e6)
    return replace(
        wide,
        layers={name: ways[index].layers[name] for name, index in chosen.items()},
        sensitivity_db={name: ways[index].sensitivity_db[name] for name, index in chosen.items()},
    )
