"""The measuring script on tiny models: every figure that a card quotes is there, and what the figures must tell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qdeploy.artifacts.manifest import TEXT_TO_IMAGE, UNCONDITIONAL
from qdeploy.base.errors import UsageError
from qdeploy.evaluate.extractors.rgb8 import Rgb8
from qdeploy.models.source import load_model
from training import measure
from training.data import Emoji
from training.figures import compute_features, kernel_distance
from training.sheet import ACROSS, ZOOM, draw_captioned, stack_rows

RNG = np.random.default_rng(0)
LABELS = ["cat", "dog", "red house", "rocket", "sun", "tree", "car", "heart", "pizza", "fish", "bird", "moon"]
FACTS = dict(
    pictures="p", captions="c", count=12, measured=6, extractor="rgb8", shown=4, guidance=5.0, steps=25, seed=0
)
TRAINED = {
    f"{part}_{fact}": 1 for part in ("diffusion", "unconditional") for fact in ("samples", "steps", "batch", "loss")
}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "COUNT", 6)
    monkeypatch.setattr(measure, "SHOWN", 4)
    monkeypatch.setattr(measure, "STEPS", 3)


def emoji() -> list[Emoji]:
    pixels = RNG.integers(0, 256, (len(LABELS), 16, 16, 3), dtype=np.uint8)
    return [Emoji(label, (), label, "g", "s", one) for label, one in zip(LABELS, pixels, strict=True)]


@pytest.mark.exports
@pytest.mark.parametrize(("fixture", "kind"), [("tiny_folder", TEXT_TO_IMAGE), ("unconditional_folder", UNCONDITIONAL)])
def test_a_card_is_filled_from_what_was_measured(
    fixture: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = load_model(str(request.getfixturevalue(fixture)))
    figures, sheet, names = measure.measure(model, emoji(), Rgb8())
    assert all(np.isfinite(value) for value in figures.values())
    assert sheet.shape == (4, 16, 16, 3)
    assert len(names) == 4
    (tmp_path / "first.json").write_text(json.dumps(dict.fromkeys(figures, 0.125)))
    first = measure.read_figures(tmp_path / "first.json", figures)
    measure.write_card(tmp_path / "card.md", kind, figures, first, FACTS | TRAINED)
    card = (tmp_path / "card.md").read_text()
    assert f"| {figures['round_trip']:.2f} dB |" in card
    assert "{" not in card
    assert "0.1250 |" in card  # the first weights' KID


@pytest.mark.parametrize("text", ["", "[]", '{"kid": 1}', '{"kid": 1, "nearest": "2"}'])
def test_other_figures_of_the_first_weights_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "first.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"--first: .*first\.json holds .*expected numbers for kid, nearest"):
        measure.read_figures(path, {"kid", "nearest"})


def test_nearness() -> None:
    found = measure.summarize_ranks(np.array([0, 0, 0.005, 0.05, 0.5]))
    assert found == pytest.approx({"nearest": 40, "near_1": 60, "near_10": 80, "median_rank": 0.5})


def test_kid_tells_sets_apart() -> None:
    one, other = (RNG.integers(low, low + 100, (60, 16, 16, 3), dtype=np.uint8) for low in (0, 100))
    half, rest, far = (compute_features(several, Rgb8()) for several in (one[:30], one[30:], other))
    assert half.shape == (30, 192)
    assert abs(kernel_distance(half, rest)) < 0.01 * kernel_distance(far, rest)


def test_sheets() -> None:
    pictures = RNG.integers(0, 256, (ACROSS + 1, 8, 8, 3), dtype=np.uint8)
    plain = draw_captioned(pictures, [""] * len(pictures))
    lettered = draw_captioned(np.full_like(pictures, 255), LABELS[: len(pictures)])
    assert np.array_equal(np.asarray(plain)[: 8 * ZOOM : ZOOM, : 8 * ZOOM : ZOOM], pictures[0])
    assert plain.height < lettered.height
    assert np.asarray(lettered)[8 * ZOOM :].min() < 128
    both = np.asarray(stack_rows([pictures, 255 - pictures], across=4))
    assert both.shape == (3 * 2 * 8 * ZOOM, 4 * 8 * ZOOM, 3)
    assert np.array_equal(both[8 * ZOOM : 16 * ZOOM : ZOOM, : 8 * ZOOM : ZOOM], 255 - pictures[0])
