"""The knapsack is as good as trying everything, and never overspends."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from qdeploy.calibrate.allocate.knapsack import BUDGET_PIECES, Choice, solve_knapsack

layer = st.tuples(st.integers(1, 50), st.floats(0.01, 10), st.floats(0, 1)).map(
    lambda drawn: (Choice(0, drawn[1]), Choice(drawn[0], drawn[1] * drawn[2]))
)


@settings(max_examples=50, deadline=None)
@given(st.lists(layer, min_size=1, max_size=6), st.integers(0, 150))
def test_as_good_as_trying_everything(choices: list[tuple[Choice, Choice]], budget: int) -> None:
    layers = {str(number): pair for number, pair in enumerate(choices)}
    chosen = solve_knapsack(layers, budget)
    picked = [layers[name][index] for name, index in chosen.items()]
    assert sum(choice.cost for choice in picked) <= budget
    slack = budget * len(layers) / BUDGET_PIECES  # costs are rounded up to a 2000th of the budget
    affordable = [c for c in itertools.product(*choices) if sum(x.cost for x in c) <= budget - slack]
    if affordable:
        least = min(sum(x.noise for x in c) for c in affordable)
        assert sum(choice.noise for choice in picked) <= least + 1e-9
