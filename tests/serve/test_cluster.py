"""Orders on replicas: what goes there and back, and what happens when one dies. Replicas are threads; Ray is not used.

``test_ray`` does the same with Ray Serve's processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from qdeploy.artifacts.manifest import MANIFEST
from qdeploy.artifacts.same_bundle import check_same_bundle
from qdeploy.base import ray_cluster
from qdeploy.base.errors import (
    BundleError,
    CancelledError,
    DeadlineError,
    EngineError,
    EngineUnavailableError,
    NonFiniteError,
    UsageError,
)
from qdeploy.base.files import hash_file
from qdeploy.base.ray_cluster import LOCAL, make_environment, set_environment
from qdeploy.cli import main
from qdeploy.serve.cluster.remote_renderer import TRIES
from qdeploy.serve.cluster.settings import ReplicaSettings, choose_replicas
from qdeploy.serve.room import EngineRoom, RoomSettings
from qdeploy.serve.shelf import Shelf
from qdeploy.serve.ticket import Made, Progress
from tests.serve.replicas import ThreadReplicas
from tests.serve.stand_in import WAIT_S, Recorder, StandInMaker, make_order, wait_until


@contextmanager
def open_door(folder: Path, replicas: ThreadReplicas, runners: int = 2) -> Iterator[tuple[EngineRoom, Recorder]]:
    recorder = Recorder()
    shelf = Shelf({"a": folder}, lambda *_: replicas.renderer)
    room = EngineRoom(shelf, RoomSettings(queue=100, runners=runners, reload_s=None), recorder)
    room.start()
    try:
        yield room, recorder
    finally:
        for maker in replicas.makers:
            maker.steps = None
        room.stop()


def test_everybody_gets_the_own_picture_from_a_replica(float_bundle: Path) -> None:
    with open_door(float_bundle, ThreadReplicas(StandInMaker(is_free=True))) as (room, recorder):
        tickets = [room.submit(make_order(seed, count=1 + seed % 3)) for seed in range(20)]
        for seed, ticket in enumerate(tickets):
            made = ticket.result(WAIT_S)
            assert made.pixels[:, 0, 0, 0].tolist() == list(range(seed, seed + 1 + seed % 3))
            assert made.waited_s >= 0
        wait_until(lambda: recorder.outcomes == ["made"] * 20)


def test_a_lost_replica_loses_no_order_and_repeats_no_step(float_bundle: Path) -> None:
    dying, other = StandInMaker(), StandInMaker(is_free=True)
    replicas, events = ThreadReplicas(dying, other), list[object]()
    with open_door(float_bundle, replicas, runners=1) as (room, recorder):
        ticket = room.submit(make_order(5, steps=6, previews=5), events.append)
        dying.steps.release(3)  # type: ignore[union-attr]
        wait_until(lambda: ticket.progress is not None and ticket.progress.index == 2)
        replicas.calls[0].kill()
        assert (ticket.result(WAIT_S).pixels == 5).all()
        wait_until(lambda: recorder.outcomes == ["made"])
    assert [event.index for event in events if isinstance(event, Progress)] == list(range(6))
    assert [event.index for event in events if isinstance(event, Progress) and event.pixels is not None] == [
        0, 1, 2, 3, 4,
    ]  # fmt: skip
    assert isinstance(events[-1], Made)
    assert replicas.calls[1].orders[0].seeds == (5,)
    assert dying.made <= 4  # what nobody hears of is stopped


def test_only_what_still_waits_is_sent_again(float_bundle: Path) -> None:
    """Two joined orders, one of which is cancelled before their replica dies."""
    busy, other = StandInMaker(), StandInMaker(is_free=True)
    replicas = ThreadReplicas(busy, other)
    with open_door(float_bundle, replicas, runners=1) as (room, _):
        first = room.submit(make_order(0, guidance_scale=1.0, steps=1))
        wait_until(lambda: len(room.list_running()) == 1)
        joined = [room.submit(make_order(seed, guidance_scale=1.0, steps=3, deadline_s=60)) for seed in (1, 2)]
        replicas.makers = (busy, busy, other)
        busy.steps.release(2)  # type: ignore[union-attr]
        first.result(WAIT_S)
        wait_until(lambda: joined[1].progress is not None)
        assert [order.seeds for order in replicas.calls[1].orders] == [(1,), (2,)]
        room.cancel(joined[0])
        replicas.calls[1].kill()
        assert (joined[1].result(WAIT_S).pixels == 2).all()
    assert [order.seeds for order in replicas.calls[2].orders] == [(2,)]
    assert 0 < replicas.calls[2].orders[0].deadline_s < 60  # type: ignore[operator]  # what is left of it


def test_an_order_that_kills_every_replica_is_given_up(float_bundle: Path) -> None:
    replicas = ThreadReplicas(StandInMaker())
    with open_door(float_bundle, replicas, runners=1) as (room, _):
        ticket = room.submit(make_order(5))
        for number in range(TRIES):
            wait_until(lambda number=number: len(replicas.calls) == number + 1)
            replicas.calls[number].kill()
        with pytest.raises(EngineError, match=f"{TRIES} replicas were lost"):
            ticket.result(WAIT_S)
    assert len(replicas.calls) == TRIES


@pytest.mark.parametrize("by_deadline", [False, True])
def test_what_nobody_waits_for_stops_on_the_replica(float_bundle: Path, by_deadline: bool) -> None:
    maker = StandInMaker()
    replicas = ThreadReplicas(maker)
    with open_door(float_bundle, replicas, runners=1) as (room, _):
        ticket = room.submit(make_order(5, steps=100, deadline_s=0.3 if by_deadline else None))
        maker.steps.release()  # type: ignore[union-attr]
        wait_until(lambda: ticket.progress is not None or ticket.has_ended)
        if not by_deadline:
            room.cancel(ticket)
        with pytest.raises(DeadlineError if by_deadline else CancelledError):
            ticket.result(WAIT_S)
        wait_until(lambda: not room.list_running())
        (call,) = replicas.calls
        wait_until(call.has_stopped)
    assert call.is_cancelled
    assert maker.made <= 3  # the step that was released, and one each that was being made


def test_errors_of_a_replica_are_those_of_the_bundle(float_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    maker = StandInMaker(is_free=True)
    errors = [NonFiniteError("guidance_scale 900 drives it out of range"), KeyError("/secret")]
    maker.fail_on = lambda _: errors.pop(0)
    with open_door(float_bundle, ThreadReplicas(maker)) as (room, _):
        with pytest.raises(NonFiniteError, match="out of range"):
            room.submit(make_order(1)).result(WAIT_S)
        with pytest.raises(RuntimeError, match="KeyError: '/secret'"):
            room.submit(make_order(1)).result(WAIT_S)
    assert any(record.exc_info for record in caplog.records)


def test_an_error_of_the_call_itself(float_bundle: Path) -> None:
    replicas = ThreadReplicas(StandInMaker())
    with open_door(float_bundle, replicas, runners=1) as (room, _):
        ticket = room.submit(make_order(1))
        wait_until(lambda: len(replicas.calls) == 1)
        replicas.calls[0]._stop(ValueError("no such method"))
        with pytest.raises(EngineError, match="of the replica: no such method"):
            ticket.result(WAIT_S)
    assert replicas.is_closed


def test_a_picture_to_start_from_reaches_the_replica(encoder_bundle: Path) -> None:
    from PIL import Image

    maker = StandInMaker(is_free=True)
    photo = Image.fromarray(np.full((16, 16, 3), 9, np.uint8))
    with open_door(encoder_bundle, ThreadReplicas(maker)) as (room, _):
        room.submit(make_order(1, image=photo, has_image=True, strength=0.5)).result(WAIT_S)
    assert np.asarray(maker.calls[0]["image"][0]).max() == 9


# ---------------------------------------------------------------------------------------------------- settings


def test_numbers_of_replicas() -> None:
    assert choose_replicas(None, None, None) == (1, 1)
    assert choose_replicas(3, None, None) == (3, 3)
    assert choose_replicas(None, 0, None) == (0, 1)
    assert choose_replicas(None, 2, None) == (2, 2)
    assert choose_replicas(None, None, 4) == (1, 4)
    with pytest.raises(UsageError, match="leave out --min-replicas"):
        choose_replicas(2, 1, None)
    with pytest.raises(UsageError, match="got 3, expected at most the 2 of --max-replicas"):
        choose_replicas(None, 3, 2)
    assert ReplicaSettings(least=2, most=2, runners=3).senders == 6
    assert ReplicaSettings(least=1, most=4, target=2.5).senders == 10  # so that Ray Serve sees who waits


def test_options_that_do_not_go_together(float_bundle: Path) -> None:
    def refuse(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["serve", str(float_bundle), *arguments], catch_exceptions=False)
        assert result.exit_code == 2, result.output
        return " ".join(result.output.split())

    for option in ("--replicas", "--min-replicas", "--max-replicas", "--replica-target", "--replica-gpus"):
        assert f"{option} is about replicas on Ray; give --ray too" in refuse(option, "2")
    assert "on Ray give --min-replicas 0" in refuse("--memory-gb", "1", "--ray")
    assert "leave out --min-replicas and --max-replicas" in refuse("--replicas", "2", "--max-replicas", "3", "--ray")
    assert "got 5, expected at most the 2" in refuse("--min-replicas", "5", "--max-replicas", "2", "--ray")


@pytest.mark.parametrize("missing", ["ray", "ray.serve"])
def test_without_ray_serve_the_extra_is_named(
    missing: str, float_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "ray.serve":
        pytest.importorskip("ray")
    monkeypatch.setitem(sys.modules, missing, None)
    result = CliRunner().invoke(main, ["serve", str(float_bundle), "--ray"])
    assert result.exit_code == EngineUnavailableError.exit_code
    assert "pip install 'qdeploy[serve-ray]'" in " ".join(result.output.split())


def test_a_bundle_that_is_another_one_on_a_machine(float_bundle: Path, tmp_path: Path) -> None:
    check_same_bundle(float_bundle, hash_file(float_bundle / MANIFEST))
    for folder, sha256 in ((float_bundle, "0" * 64), (tmp_path, "0" * 64)):
        with pytest.raises(BundleError, match="is not the bundle to use"):
            check_same_bundle(folder, sha256)


def test_ray_keeps_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """No statistics are sent; a cluster of our own listens at the loopback address, and asks for a token."""
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    ours = make_environment(LOCAL)
    assert ours["RAY_USAGE_STATS_ENABLED"] == "0"
    assert (ours["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"], ours["RAY_AUTH_MODE"]) == ("0", "token")
    assert len(ours["RAY_AUTH_TOKEN"]) == 64
    assert make_environment("auto") == {"RAY_USAGE_STATS_ENABLED": "0"}
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")  # what the user has set stays
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with set_environment(ours):
        assert (os.environ["RAY_USAGE_STATS_ENABLED"], os.environ["RAY_AUTH_MODE"]) == ("1", "token")
    assert "RAY_AUTH_MODE" not in os.environ
    assert ray_cluster.draw_token() == ray_cluster.draw_token()
