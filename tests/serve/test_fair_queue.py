"""The queue by itself: bounds, turns, and which orders go together."""

from __future__ import annotations

from qdeploy.serve.fair_queue import FairQueue
from qdeploy.serve.order import choose_preview_steps
from qdeploy.serve.ticket import Ticket
from tests.serve.stand_in import make_order


def fill(queue: FairQueue, *orders: tuple[str, int]) -> list[Ticket]:
    tickets = [Ticket(make_order(seed, client=client)) for client, seed in orders]
    for ticket in tickets:
        queue.push(ticket)
    return tickets


def pop_seeds(queue: FairQueue) -> list[int]:
    seeds = []
    while (ticket := queue.pop()) is not None:
        seeds += ticket.order.seeds
    return seeds


def test_clients_take_turns() -> None:
    queue = FairQueue(100)
    fill(queue, *(("many", seed) for seed in range(5)), ("few", 10), ("one", 20), ("few", 11))
    assert pop_seeds(queue) == [0, 10, 20, 1, 11, 2, 3, 4]


def test_who_comes_later_waits_for_one_picture_of_each() -> None:
    queue = FairQueue(100)
    fill(queue, *(("many", seed) for seed in range(4)))
    assert queue.pop().order.seeds == (0,)  # type: ignore[union-attr]
    fill(queue, ("late", 9))
    assert pop_seeds(queue) == [1, 9, 2, 3]


def test_the_bound_counts_pictures() -> None:
    queue = FairQueue(4)
    assert not queue.is_full_for(9)  # it could never be served otherwise
    queue.push(Ticket(make_order(count=3)))
    assert not queue.is_full_for(1)
    assert queue.is_full_for(2)
    assert queue.pictures == 3


def test_equal_settings_go_together() -> None:
    queue = FairQueue(100)
    first, *_ = fill(queue, ("a", 0), ("a", 1), ("b", 2), ("b", 3))
    other = Ticket(make_order(4, client="c", guidance_scale=3.0))
    queue.push(other)
    assert queue.pop() is first
    assert [ticket.order.seeds for ticket in queue.pop_equal(first, 2)] == [(2,), (1,)]  # b's turn
    assert [ticket.order.seeds for ticket in queue] == [(3,), (4,)]
    assert queue.pop_equal(other, 0) == []


def test_what_is_too_many_is_left_in_its_place() -> None:
    queue = FairQueue(100)
    large, small = Ticket(make_order(0, count=4, client="a")), Ticket(make_order(9, client="b"))
    queue.push(large)
    queue.push(small)
    assert queue.pop_equal(Ticket(make_order(5)), 3) == [small]
    assert queue.pop() is large


def test_one_is_taken_out() -> None:
    queue = FairQueue(100)
    first, second = fill(queue, ("a", 0), ("a", 1))
    assert queue.remove(first)
    assert not queue.remove(first)
    assert queue.pop() is second
    assert queue.pop() is None


def test_previews_are_spread_and_never_the_last_step() -> None:
    assert choose_preview_steps(25, 3) == {5, 11, 17}
    assert choose_preview_steps(4, 100) == {0, 1, 2}
    assert choose_preview_steps(1, 3) == choose_preview_steps(10, 0) == frozenset()
