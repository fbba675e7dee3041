"""Any number of pictures: made and written in batches, equal to those of one request, never held together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import qdeploy
from qdeploy.base.errors import UsageError
from qdeploy.cli import main
from qdeploy.runtime.pipeline import Pipeline
from qdeploy.sample.numbered import choose_batch, list_outputs, name_picture, write_pictures


def test_batches_change_no_picture(float_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with qdeploy.load(float_bundle) as pipe:
        expected = pipe("a cat", steps=2, seed=3, count=5).pixels
    batches, call = [], Pipeline.__call__

    def record_batch(self: Pipeline, *arguments: Any, **options: Any) -> Any:
        batches.append((options["first"], options["count"]))
        return call(self, *arguments, **options)

    monkeypatch.setattr(Pipeline, "__call__", record_batch)
    monkeypatch.setattr("qdeploy.sample.numbered.MAX_BATCH", 2)
    asked = ["generate", str(float_bundle), "a cat", "-o", str(tmp_path / "cat.png"), "--count", "5", "--seed", "3"]
    done = CliRunner().invoke(main, ["--quiet", *asked, "--steps", "2"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert batches == [(0, 2), (2, 2), (4, 1)]
    for number, pixels in enumerate(expected):
        with Image.open(tmp_path / f"cat-{number}.png") as picture:
            assert np.array_equal(np.asarray(picture), pixels)
    again = CliRunner().invoke(main, ["--quiet", *asked, "--steps", "2"], catch_exceptions=False)
    assert again.exit_code == 0, again.output  # its own pictures are replaced


def test_two_hundred_thousand_are_written_one_batch_after_the_other(tmp_path: Path) -> None:
    """The first files are there when the second batch is asked for; nothing waits for the last one."""
    asked: list[range] = []

    def render(numbers: range) -> list[Image.Image]:
        asked.append(numbers)
        return [Image.new("RGB", (2, 2)) for _ in numbers]

    written = write_pictures(render, tmp_path / "x.png", 200_000, 4)
    for _ in range(65):
        next(written)
    assert asked == [range(64), range(64, 128)]
    assert len(list(tmp_path.glob("x-*.png"))) == 65
    written.close()


def test_the_places_of_many_are_checked_quickly_and_by_name(tmp_path: Path) -> None:
    (tmp_path / "cat-77.png").write_text("a letter")
    (tmp_path / "cat-200000.png").write_text("a letter that is not in the way")
    places = list_outputs(tmp_path / "cat.png", 200_000, 512 * 512)
    assert [output.path.name for output in places] == ["cat-0.png", "cat-77.png"]
    assert places[0].needed_bytes == 512 * 512 * 200_000  # at least; what is more is met when it comes
    assert list_outputs(tmp_path / "cat", 1, 4)[0].path == name_picture(tmp_path / "cat", 0, 1) == tmp_path / "cat"
    assert list_outputs(tmp_path / "cat-v1.5", 1, 4)[0].path == tmp_path / "cat-v1.5"
    assert name_picture(tmp_path / "cat-v1.5", 3, 9) == tmp_path / "cat-v1.5-3"
    with pytest.raises(UsageError, match=r"got the suffix \.jpg, expected \.png"):
        list_outputs(tmp_path / "cat.jpg", 1, 4)


@pytest.mark.parametrize(("pixels", "batch"), [(1, 64), (64 * 64, 64), (512 * 512, 16), (8192 * 8192, 1)])
def test_batches_are_smaller_where_pictures_are_larger(pixels: int, batch: int) -> None:
    assert choose_batch(pixels) == batch


@pytest.mark.parametrize("name", ["CAT-3.PNG", "Cat-3.png"])
def test_other_spellings_count_where_the_disk_takes_them_for_one_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text("a letter")
    assert len(list_outputs(tmp_path / "cat.png", 5, 4)) == 1
    monkeypatch.setattr("os.path.lexists", lambda path: path.name == "cat-3.png")  # as on macOS and Windows
    assert [output.path.name for output in list_outputs(tmp_path / "cat.png", 5, 4)] == ["cat-0.png", "cat-3.png"]


def test_a_letter_that_appears_during_the_work_is_not_replaced(tmp_path: Path) -> None:
    def render(numbers: range) -> list[Image.Image]:
        (tmp_path / "x-1.png").write_text("a letter")
        return [Image.new("RGB", (2, 2)) for _ in numbers]

    with pytest.raises(UsageError, match=r"x-1\.png is there already"):
        list(write_pictures(render, tmp_path / "x.png", 3, 4))
    assert (tmp_path / "x-1.png").read_text() == "a letter"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-0.png", "x-1.png"]
