"""The engine room over real tiny bundles: joined pictures, stopping, pictures to start from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qdeploy
from qdeploy.base.errors import CancelledError
from qdeploy.serve.loading import make_loader
from qdeploy.serve.order import Order, PictureSettings
from qdeploy.serve.room import EngineRoom, RoomSettings
from qdeploy.serve.shelf import Shelf
from tests.serve.stand_in import WAIT_S, Recorder, make_order, wait_until


def start_room(recorder: Recorder, folders: dict[str, Path], memory_bytes: int | None = None) -> EngineRoom:
    room = EngineRoom(Shelf(folders, make_loader(threads=1), memory_bytes), RoomSettings(), recorder)
    room.start()
    return room


def test_joined_pictures_are_those_of_the_runtime(float_bundle: Path) -> None:
    settings = dict(steps=3, guidance_scale=1.0)
    with qdeploy.load(float_bundle, threads=1) as pipe:
        expected = [pipe(f"picture {seed}", seed=seed, **settings).pixels for seed in range(12)]
    recorder = Recorder()
    room = start_room(recorder, {"a": float_bundle})
    with ThreadPoolExecutor(12) as pool:
        tickets = list(pool.map(lambda seed: room.submit(make_order(seed, client=str(seed), **settings)), range(12)))
    for ticket, pixels in zip(tickets, expected, strict=True):
        assert np.array_equal(ticket.result(WAIT_S).pixels, pixels)
    room.stop()
    assert max(recorder.joined) == 2


def test_pictures_of_one_order_have_seeds_of_their_own(float_bundle: Path) -> None:
    """So that each can be asked for again by itself."""
    room = start_room(Recorder(), {"a": float_bundle})
    together = room.submit(make_order(5, count=3, prompt="a cat")).result(WAIT_S)
    single = room.submit(make_order(7, prompt="a cat")).result(WAIT_S)
    room.stop()
    assert np.array_equal(together.pixels[2:], single.pixels)


def test_from_a_picture_of_any_size(encoder_bundle: Path) -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    mask = Image.new("L", (60, 40))
    mask.paste(255, (0, 0, 30, 40))
    settings = PictureSettings(steps=3, strength=0.7, has_image=True, has_mask=True)
    room = start_room(Recorder(), {"a": encoder_bundle})
    made = room.submit(Order("a", "a cat", (1, 2), settings, image=photo, mask=mask)).result(WAIT_S)
    room.stop()
    assert made.pixels.shape == (2, 16, 16, 3)


def test_a_real_step_is_the_last_after_cancelling(float_bundle: Path) -> None:
    room = start_room(Recorder(), {"a": float_bundle})
    ticket = room.submit(make_order(steps=900))
    wait_until(lambda: ticket.progress is not None)
    room.cancel(ticket)
    with pytest.raises(CancelledError):
        ticket.result(0)
    wait_until(lambda: not room.list_running())
    assert ticket.progress is not None
    assert ticket.progress.index < 899
    room.stop()


def test_one_component_at_a_time(float_bundle: Path) -> None:
    """A bundle that is larger than the memory allowed for all is run with ``low_memory``."""
    from qdeploy.artifacts.bundle import open_bundle

    opened = open_bundle(float_bundle)
    largest = max(map(opened.component_bytes, opened.manifest.components))
    room = start_room(Recorder(), {"a": float_bundle}, largest)
    made = room.submit(make_order(3)).result(WAIT_S)
    with room.shelf.borrow("a") as renderer:
        assert not any(component.is_open for component in renderer.maker.components.values())  # type: ignore[attr-defined]
    room.stop()
    with qdeploy.load(float_bundle, threads=1) as pipe:
        assert np.array_equal(made.pixels, pipe("picture 3", seed=3, steps=2).pixels)
