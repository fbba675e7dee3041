"""An input stays on the device only when nothing can have changed it."""

from __future__ import annotations

import numpy as np
import pytest

from qdeploy.engines.nvidia.resident import ResidentInputs, is_frozen


def freeze(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def test_the_same_frozen_array_is_held() -> None:
    residents, text = ResidentInputs(), freeze(np.ones((2, 3), np.float32))
    assert not residents.holds("text", text)
    assert residents.holds("text", text)
    assert residents.holds("text", text[0:2])  # the runtime cuts anew at every call
    assert not residents.holds("other", text)


@pytest.mark.parametrize(
    "other",
    [lambda a: a[0:1], lambda a: a.T, lambda a: a.view(np.int32), lambda a: freeze(a.copy())],
    ids=["rows", "strides", "dtype", "equal copy"],
)
def test_another_view_is_not(other) -> None:  # noqa: ANN001
    residents, text = ResidentInputs(), freeze(np.ones((3, 3), np.float32))
    residents.holds("text", text)
    assert not residents.holds("text", other(text))


def test_what_can_be_written_is_copied_every_time() -> None:
    residents, latents = ResidentInputs(), np.ones(4, np.float32)
    assert not residents.holds("x", latents)
    assert not residents.holds("x", latents)
    view = latents.view()
    view.flags.writeable = False  # read-only, of memory that is not
    assert not is_frozen(view)
    assert not residents.holds("x", view)


def test_memory_of_another_library_is_not_trusted() -> None:
    assert not is_frozen(np.frombuffer(bytearray(8), np.float32))


def test_a_writeable_feed_between_makes_it_forgotten() -> None:
    residents, text = ResidentInputs(), freeze(np.ones(4, np.float32))
    residents.holds("text", text)
    residents.holds("text", np.zeros(4, np.float32))
    assert not residents.holds("text", text)


def test_forgetting() -> None:
    residents, text = ResidentInputs(), freeze(np.ones(4, np.float32))
    residents.holds("text", text)
    residents.forget()
    assert not residents.holds("text", text)


def test_freed_memory_is_not_mistaken() -> None:
    """The address of a freed array may come again with other contents; the array is kept, so it cannot."""
    residents = ResidentInputs()
    residents.holds("text", freeze(np.full(1000, 1.0, np.float32)))
    assert not any(residents.holds("text", freeze(np.full(1000, float(n), np.float32))) for n in range(50))
