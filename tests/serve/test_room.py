"""The engine room under load, with stand-ins whose steps the tests release: nothing here depends on time."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.base.errors import (
    CancelledError,
    DeadlineError,
    EngineError,
    NonFiniteError,
    QueueFullError,
    RequestError,
    StoppingError,
    UnknownBundleError,
    UsageError,
)
from qdeploy.sampling.call_schedule import CallSchedule
from qdeploy.serve.order import PictureSettings
from qdeploy.serve.shelf import Shelf
from qdeploy.serve.ticket import Made, Progress, Ticket
from tests.serve.stand_in import WAIT_S, StandInMaker, make_order, open_room, wait_until

PREVIEW_S = 1.0  # far longer than a stand-in takes for its steps
UNGUIDED = {"guidance_scale": 1.0}


def colours(ticket: Ticket) -> list[int]:
    """The seeds that the ticket's pictures were made of."""
    return ticket.result(WAIT_S).pixels[:, 0, 0, 0].tolist()


def test_everybody_gets_the_own_picture(float_bundle: Path) -> None:
    with open_room({"a": float_bundle}, queue=1000) as (room, recorder), ThreadPoolExecutor(8) as pool:
        tickets = list(pool.map(lambda seed: room.submit(make_order(seed, count=1 + seed % 3)), range(100)))
        for seed, ticket in enumerate(tickets):
            assert colours(ticket) == list(range(seed, seed + 1 + seed % 3))
        wait_until(lambda: recorder.outcomes == ["made"] * 100)


def test_events_come_in_order_and_end_once(float_bundle: Path) -> None:
    events: list[object] = []
    with open_room({"a": float_bundle}) as (room, _):
        room.submit(make_order(7, steps=4, previews=2), events.append).result(WAIT_S)
    assert [event.index for event in events if isinstance(event, Progress)] == [0, 1, 2, 3]
    shown = {event.index: event.pixels for event in events if isinstance(event, Progress) and event.pixels is not None}
    assert list(shown) == [0, 1]
    assert (shown[0] == 7).all()
    assert [type(event) for event in events].count(Made) == 1
    assert isinstance(events[-1], Made)


def test_a_full_queue_says_when_to_come_back(float_bundle: Path) -> None:
    maker = StandInMaker()
    with open_room({"a": float_bundle}, {"a": maker}, queue=2) as (room, _):
        running = room.submit(make_order(0))
        wait_until(lambda: running.has_begun)
        waiting = [room.submit(make_order(seed)) for seed in (1, 2)]
        with pytest.raises(QueueFullError, match="2 pictures wait and 2 may; try again in about") as refused:
            room.submit(make_order(3))
        assert refused.value.retry_after_s > 0
        for _ in range(6):
            maker.steps.release()  # type: ignore[union-attr]
        assert [colours(ticket) for ticket in (running, *waiting)] == [[0], [1], [2]]
        assert room.count_waiting("a") == 0
        room.submit(make_order(4))


def test_clients_take_turns(float_bundle: Path) -> None:
    maker = StandInMaker()
    with open_room({"a": float_bundle}, {"a": maker}) as (room, _):
        first = room.submit(make_order(0, client="many"))
        wait_until(lambda: first.has_begun)
        tickets = [room.submit(make_order(seed, client="many")) for seed in (1, 2, 3)]
        tickets.append(room.submit(make_order(9, client="one")))
        for _ in range(10):
            maker.steps.release()  # type: ignore[union-attr]
        for ticket in tickets:
            ticket.result(WAIT_S)
    assert [call["seed"] for call in maker.calls] == [[0], [1], [9], [2], [3]]


def test_cancelling_stops_within_one_step(float_bundle: Path) -> None:
    maker = StandInMaker()
    with open_room({"a": float_bundle}, {"a": maker}) as (room, recorder):
        running, waiting, last = (room.submit(make_order(seed, steps=50)) for seed in range(3))
        maker.steps.release()  # type: ignore[union-attr]
        wait_until(lambda: running.progress is not None)
        room.cancel(waiting)
        room.cancel(running)
        with pytest.raises(CancelledError):
            running.result(0)
        assert room.count_waiting("a") == 1
        made = maker.made
        maker.steps.release()  # type: ignore[union-attr]
        wait_until(lambda: last.has_begun)
        assert maker.made <= made + 1
        assert [call["seed"] for call in maker.calls] == [[0], [2]]
        wait_until(lambda: recorder.outcomes == ["cancelled", "cancelled"])


def test_deadlines_pass_in_the_queue_and_at_work(float_bundle: Path) -> None:
    maker = StandInMaker()
    with open_room({"a": float_bundle}, {"a": maker}) as (room, _):
        running = room.submit(make_order(0, steps=50, deadline_s=0.3))
        wait_until(lambda: running.has_begun)
        waiting = room.submit(make_order(1, deadline_s=0.01))
        with pytest.raises(DeadlineError, match=r"deadline of 0\.01 s has passed in the queue"):
            waiting.result(WAIT_S)
        with pytest.raises(DeadlineError, match="while the picture was made"):
            running.result(WAIT_S)  # in the middle of a step
        maker.steps = None
        assert colours(room.submit(make_order(2))) == [2]


def test_orders_share_calls_only_where_rows_are_free(float_bundle: Path, open_bundle: Path) -> None:
    """The float bundle's UNet has two rows: free without guidance, taken with it. The other's batch is open."""
    for folder, at_once, settings, joined in (
        (float_bundle, 1, UNGUIDED, [1, 2, 2]),
        (float_bundle, 1, {}, [1, 1, 1, 1, 1]),
        (open_bundle, 1, UNGUIDED, [1, 1, 1, 1, 1]),
        (open_bundle, 4, {}, [1, 4]),
    ):
        maker = StandInMaker()
        with open_room({"a": folder}, {"a": maker}, pictures_at_once=at_once) as (room, recorder):
            first = room.submit(make_order(0, **settings))
            wait_until(lambda first=first: first.has_begun)
            tickets = [room.submit(make_order(seed, client=str(seed), **settings)) for seed in (1, 2, 3, 4)]
            maker.steps, waiting = None, maker.steps
            waiting.release(100)  # type: ignore[union-attr]
            assert [colours(ticket) for ticket in (first, *tickets)] == [[0], [1], [2], [3], [4]]
            assert recorder.joined == joined


def test_one_of_two_joined_is_cancelled(float_bundle: Path) -> None:
    maker = StandInMaker()
    with open_room({"a": float_bundle}, {"a": maker}) as (room, _):
        blocker = room.submit(make_order(0))
        wait_until(lambda: blocker.has_begun)
        left, kept = (room.submit(make_order(seed, **UNGUIDED)) for seed in (1, 2))
        maker.steps.release(3)  # type: ignore[union-attr]
        wait_until(lambda: kept.progress is not None)
        room.cancel(left)
        maker.steps.release()  # type: ignore[union-attr]
        assert colours(kept) == [2]
        assert left.outcome == "cancelled"
        assert maker.calls[-1]["seed"] == [1, 2]


def test_an_error_of_one_is_not_the_others(float_bundle: Path) -> None:
    maker = StandInMaker()
    maker.fail_on = lambda arguments: NonFiniteError("the latents hold NaN") if 13 in arguments["seed"] else None
    with open_room({"a": float_bundle}, {"a": maker}) as (room, _):
        blocker = room.submit(make_order(0))
        wait_until(lambda: blocker.has_begun)
        broken, sound = (room.submit(make_order(seed, **UNGUIDED)) for seed in (13, 2))
        maker.steps.release(10)  # type: ignore[union-attr]
        assert colours(sound) == [2]
        with pytest.raises(NonFiniteError):
            broken.result(WAIT_S)
    assert [call["seed"] for call in maker.calls] == [[0], [13, 2], [13], [2]]


def test_a_fault_of_ours_ends_the_ticket_and_not_the_runner(float_bundle: Path) -> None:
    maker = StandInMaker(is_free=True)
    maker.fail_on = lambda arguments: KeyError("fault") if 13 in arguments["seed"] else None
    with open_room({"a": float_bundle}, {"a": maker}) as (room, _):
        with pytest.raises(KeyError):
            room.submit(make_order(13)).result(WAIT_S)
        assert colours(room.submit(make_order(2))) == [2]


def test_several_runners_work_at_once(float_bundle: Path) -> None:
    maker = StandInMaker()
    with open_room({"a": float_bundle}, {"a": maker}, runners=3) as (room, _):
        tickets = [room.submit(make_order(seed)) for seed in range(4)]
        wait_until(lambda: len(room.list_running()) == 3)
        assert room.count_waiting("a") == 1
        maker.steps.release(8)  # type: ignore[union-attr]
        assert [colours(ticket) for ticket in tickets] == [[0], [1], [2], [3]]


def test_stopping_finishes_what_has_time_and_refuses_the_rest(float_bundle: Path) -> None:
    maker = StandInMaker()
    with open_room({"a": float_bundle}, {"a": maker}) as (room, _), ThreadPoolExecutor(1) as pool:
        running, waiting = (room.submit(make_order(seed)) for seed in range(2))
        wait_until(lambda: running.has_begun)
        stopping = pool.submit(room.stop, WAIT_S)
        wait_until(lambda: not room.is_ready)
        with pytest.raises(StoppingError, match="takes no more requests"):
            room.submit(make_order(5))
        maker.steps.release(4)  # type: ignore[union-attr]
        stopping.result(WAIT_S)
        assert [colours(running), colours(waiting)] == [[0], [1]]
        assert maker.is_closed


def test_stopping_at_once_ends_every_ticket(float_bundle: Path) -> None:
    maker = StandInMaker()
    with open_room({"a": float_bundle}, {"a": maker}) as (room, _), ThreadPoolExecutor(1) as pool:
        tickets = [room.submit(make_order(seed)) for seed in range(3)]
        wait_until(lambda: tickets[0].has_begun)
        stopping = pool.submit(room.stop, 0)
        for ticket in tickets:
            with pytest.raises(StoppingError):
                ticket.result(WAIT_S)
        maker.steps.release()  # type: ignore[union-attr]
        stopping.result(WAIT_S)


def test_what_cannot_be_served_is_refused_before_it_waits(float_bundle: Path, encoder_bundle: Path) -> None:
    folders = {"a": float_bundle, "encoder": encoder_bundle}
    for order, words in (
        (make_order(width=20), "width: got 20, expected 16"),
        (make_order(scheduler="heun"), "scheduler: unknown 'heun'"),
        (make_order(prompt=None), "prompt: got none"),
        (make_order(prompt="x" * 10_001), "a prompt of 10001 characters is too long"),
        (make_order(has_image=True), "image: got a picture, expected none"),
        (make_order(bundle="encoder", has_mask=True), "mask: got one without image"),
        (make_order(bundle="encoder", has_image=True, steps=2, strength=0.1), "strength: got 0.1 of 2 steps"),
    ):
        with open_room(folders) as (room, _), pytest.raises(RequestError, match=words):
            room.submit(order)
    with open_room(folders) as (room, _), pytest.raises(UnknownBundleError, match="got 'b', expected one of a, enc"):
        room.submit(make_order(bundle="b"))


# ------------------------------------------------------------------------------------------------- several bundles


def read_bytes(folder: Path) -> int:
    return open_bundle(folder).total_bytes


def test_the_longest_unused_bundle_makes_room(float_bundle: Path, tmp_path: Path) -> None:
    folders = {name: Path(shutil.copytree(float_bundle, tmp_path / name)) for name in "abc"}
    makers = {name: StandInMaker(is_free=True) for name in folders}
    with open_room(folders, makers, memory_bytes=int(2.5 * read_bytes(float_bundle))) as (room, _):
        assert list(room.shelf.list_loaded()) == ["a", "b"]
        for name, loaded in (("c", "bc"), ("b", "bc"), ("a", "ab"), ("b", "ab"), ("c", "bc")):
            room.submit(make_order(bundle=name)).result(WAIT_S)
            wait_until(lambda loaded=loaded: list(room.shelf.list_loaded()) == list(loaded))
    assert all(maker.is_closed for maker in makers.values())


def test_a_busy_bundle_keeps_no_other_out(float_bundle: Path, tmp_path: Path) -> None:
    """``b`` has room only while nobody uses ``a``, whose queue is never empty."""
    folders = {name: Path(shutil.copytree(float_bundle, tmp_path / name)) for name in "ab"}
    maker = StandInMaker()
    with open_room(folders, {"a": maker}, memory_bytes=int(1.5 * read_bytes(float_bundle))) as (room, _):
        busy = [room.submit(make_order(seed)) for seed in range(3)]
        wait_until(lambda: busy[0].has_begun)
        other = room.submit(make_order(5, bundle="b"))
        wait_until(lambda: len(room.list_running()) == 2)
        maker.steps.release(2)  # type: ignore[union-attr]
        assert colours(other) == [5]
        assert busy[1].outcome in ("waiting", "running")
        maker.steps.release(4)  # type: ignore[union-attr]
        assert [colours(ticket) for ticket in busy] == [[0], [1], [2]]


def test_orders_of_other_calls_are_not_joined(float_bundle: Path) -> None:
    maker = StandInMaker()
    with open_room({"a": float_bundle}, {"a": maker}, pictures_at_once=4) as (room, recorder):
        schedules = [CallSchedule(), CallSchedule(speed="fast"), CallSchedule(speed="fast")]
        busy = room.submit(make_order(9, steps=1, **UNGUIDED))
        wait_until(lambda: len(room.list_running()) == 1)
        tickets = [room.submit(make_order(seed, calls=calls, **UNGUIDED)) for seed, calls in enumerate(schedules)]
        maker.steps.release(20)  # type: ignore[union-attr]
        assert [colours(ticket) for ticket in (busy, *tickets)] == [[9], [0], [1], [2]]
        wait_until(lambda: recorder.joined == [1, 1, 2])
    assert [call["speed"] for call in maker.calls] == ["exact", "exact", "fast"]
    assert maker.calls[2]["forecast"] == CallSchedule(speed="fast").forecast


def test_a_bundle_larger_than_the_memory_is_loaded_by_component(float_bundle: Path) -> None:
    loaded: list[bool] = []

    def load(name: str, folder: Path, low_memory: bool) -> StandInMaker:
        loaded.append(low_memory)
        return StandInMaker(is_free=True)

    opened = open_bundle(float_bundle)
    largest = max(map(opened.component_bytes, opened.manifest.components))
    shelf = Shelf({"a": float_bundle}, load, largest)
    with shelf.borrow("a"):
        assert shelf.list_loaded() == {"a": largest}
    assert loaded == [True]
    with pytest.raises(UsageError, match=r"--memory-gb: got .*, expected at least .*: the largest component of"):
        Shelf({"a": float_bundle}, load, largest - 1)


def test_a_bundle_that_cannot_be_loaded(float_bundle: Path) -> None:
    attempts: list[Path] = []

    def load(name: str, folder: Path, low_memory: bool) -> StandInMaker:
        attempts.append(folder)
        if len(attempts) == 1:
            raise EngineError("no such engine")
        return StandInMaker(is_free=True)

    shelf = Shelf({"a": float_bundle}, load, read_bytes(float_bundle))
    with pytest.raises(EngineError), shelf.borrow("a"):
        pass
    with shelf.borrow("a") as maker:
        assert isinstance(maker, StandInMaker)


# ---------------------------------------------------------------------------------------------------- hot reload


def touch(folder: Path) -> None:
    manifest = folder / "manifest.json"
    stamp = manifest.stat().st_mtime_ns + 10**9
    os.utime(manifest, ns=(stamp, stamp))


def test_a_new_export_takes_over_and_the_old_one_finishes(float_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(float_bundle, tmp_path / "a"))
    makers = [StandInMaker(), StandInMaker(is_free=True)]
    shelf = Shelf({"a": folder}, lambda *_: makers[len(shelf.list_loaded())])
    with shelf.borrow("a") as old:
        assert old is makers[0]
        touch(folder)
        assert shelf.reload_changed() == [("a", None)]
        with shelf.borrow("a") as new:
            assert new is makers[1]
        assert not makers[0].is_closed
    assert makers[0].is_closed
    assert not makers[1].is_closed
    assert shelf.reload_changed() == []
    shelf.close()
    assert makers[1].is_closed


def test_a_broken_export_leaves_the_old_one_in_use(float_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(float_bundle, tmp_path / "a"))
    with open_room({"a": folder}, {"a": StandInMaker(is_free=True)}, reload_s=0.01) as (room, recorder):
        (folder / "unet" / "model.onnx").write_bytes(b"cut")
        touch(folder)
        wait_until(lambda: len(recorder.reloads) > 0)
        name, error = recorder.reloads[0]
        assert (name, "model.onnx" in str(error)) == ("a", True)
        assert colours(room.submit(make_order(3))) == [3]
        shutil.rmtree(folder)
        assert colours(room.submit(make_order(4))) == [4]
    assert len(recorder.reloads) == 1  # it is not tried again and again


def test_previews_are_no_part_of_a_pictures_time(float_bundle: Path) -> None:
    class SlowDecoder(StandInMaker):
        def decode(self, latents: np.ndarray) -> np.ndarray:
            time.sleep(PREVIEW_S if self.made < 3 else 0)
            return super().decode(latents)

    with open_room({"a": float_bundle}, {"a": SlowDecoder(is_free=True)}) as (room, _):
        made = room.submit(make_order(3, steps=3, previews=2)).result(WAIT_S)
    assert made.spent_s < PREVIEW_S


def test_settings_decide_what_is_equal() -> None:
    assert PictureSettings(steps=3) == PictureSettings(steps=3)
    assert PictureSettings(steps=3) != PictureSettings(steps=3, has_image=True)


def test_a_ticket_ends_once() -> None:
    ends: list[object] = []
    ticket = Ticket(make_order(), ends.append)
    made = Made(np.zeros((1, 2, 2, 3), np.uint8), 0, 0)
    ticket.finish(made)
    ticket.fail(CancelledError("late"))
    assert ends == [made]
    assert ticket.result(0) is made
    with pytest.raises(TimeoutError):
        Ticket(make_order()).result(0)
