"""Which pictures are chosen and what they are called: rules, on made-up pictures; none is fetched."""

from __future__ import annotations

import numpy as np
import pytest

from training.data import MIN_DISTANCE, SHARED, SHORT, Emoji, draw_caption, is_common, keep_own_tags, select_distinct

BLACK = np.zeros((4, 4, 3), np.uint8)


def emoji(label: str, *tags: str, group: str = "food-drink", subgroup: str = "food-fruit") -> Emoji:
    return Emoji(label, tags, label.upper(), group, subgroup, BLACK)


@pytest.mark.parametrize(
    ("group", "subgroup", "asked"),
    [
        ("food-drink", "food-fruit", True),
        ("people-body", "body-parts", True),
        ("people-body", "family", False),
        ("flags", "country-flag", False),
        ("travel-places", "time", False),
        ("symbols", "zodiac", False),
        ("none", "none", False),
    ],
)
def test_groups(group: str, subgroup: str, asked: bool) -> None:
    assert is_common(emoji("x", group=group, subgroup=subgroup)) is asked


def test_the_later_of_two_twins_is_left_out() -> None:
    pictures = np.stack([BLACK, BLACK + (MIN_DISTANCE - 1), BLACK + MIN_DISTANCE, BLACK + 2 * MIN_DISTANCE - 1]).astype(
        np.uint8
    )
    assert select_distinct(pictures, MIN_DISTANCE) == [0, 2]
    assert select_distinct(pictures[::-1], MIN_DISTANCE) == [0, 2]
    assert select_distinct(pictures, 0) == [0, 1, 2, 3]


def test_tags_that_lead_nowhere_are_dropped() -> None:
    found = keep_own_tags(
        [emoji("red apple", "fruit", "red", "ripe"), emoji("cherries", "fruit", "red"), emoji("red", "fruit", "ripe")]
    )
    assert SHARED == 2
    assert found[0].tags == ("apple", "ripe")  # the short name first; "fruit" is shared by three, "red" is a label
    assert found[1].tags == ()
    assert found[2].tags == ("ripe",)


def test_a_short_name_belongs_to_one_picture() -> None:
    found = keep_own_tags([emoji("automobile", "vehicle"), emoji("race", "car", "fast")])
    assert found[0].tags == ("car", "vehicle")
    assert found[1].tags == ("fast",)
    assert len(set(SHORT.values())) == len(SHORT)


def test_captions_are_short_and_of_the_picture() -> None:
    rng = np.random.default_rng(0)
    apple = keep_own_tags([emoji("red apple", "ripe")])[0]
    drawn = [draw_caption(apple, rng) for _ in range(2000)]
    names = {"red apple", "apple", "ripe"}
    both = {f"red apple, {tag}" for tag in ("apple", "ripe")}
    assert set(drawn) == names | {f"a{'n' * (name[0] == 'a')} {name}" for name in names} | both
    assert 0.5 < drawn.count("red apple") / len(drawn) < 0.6
    assert drawn.count("apple") > drawn.count("ripe") > 0
    assert {draw_caption(emoji("pear"), rng) for _ in range(50)} == {"pear"}
