"""Spacings of a scheduler's timesteps among the trained ones (Lin et al. 2023, arXiv:2305.08891, table 2)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SPACINGS = ("linspace", "leading", "trailing")


def linspace(points: int, end: int) -> NDArray[np.int64]:
    """``points`` timesteps over all of 0 to ``end - 1``, ascending: ``int64[points]``."""
    return np.linspace(0, end - 1, points).round().astype(np.int64)


def leading(points: int, end: int, steps_offset: int) -> NDArray[np.int64]:
    """``points`` timesteps from ``steps_offset`` up with an integer stride, ascending: ``int64[points]``."""
    return np.arange(points) * (end // points) + steps_offset


def trailing(steps: int, end: int, train_steps: int) -> NDArray[np.int64]:
    """At most ``steps`` timesteps from ``end - 1`` down, ``train_steps / steps`` apart, ascending.

    Cut to ``steps``: rounding makes ``arange`` one longer for 62 of the step counts up to 1000 (61, 103
    …), whereupon diffusers calls the model once more, at timestep -1, and spoils the picture.
    """
    descending = np.arange(end, 0, -train_steps / steps)[:steps]
    return descending[::-1].round().astype(np.int64) - 1


def space_timesteps(spacing: str, steps: int, train_steps: int, steps_offset: int) -> NDArray[np.int64]:
    """The ``int64[steps]`` timesteps of PNDM and DDIM, ascending."""
    if spacing == "linspace":
        return linspace(steps, train_steps)
    if spacing == "leading":
        return leading(steps, train_steps, steps_offset)
    return trailing(steps, train_steps, train_steps)
