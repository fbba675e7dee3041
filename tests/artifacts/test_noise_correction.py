"""The noise correction undoes the noise it models, never harms what it was fitted to, and refuses bad files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from qdeploy.artifacts.noise_correction import (
    NoiseCorrection,
    fit_noise_correction,
    fit_step,
    load_noise_correction,
    save_noise_correction,
    sum_noise,
)
from qdeploy.base.errors import TableError
from qdeploy.base.numerics import sqnr_db

ROUND_OFF = 1e-5  # float32, of values around 1
ROUND_OFF_DB = 1e-3  # float32 slopes and means, where a fit changes next to nothing


def correction(timesteps: list[int], slope: list[float], mean: list[list[float]]) -> NoiseCorrection:
    return NoiseCorrection(np.array(timesteps), np.array(slope, np.float32), np.array(mean, np.float32))


def outputs(seed: int, batch: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 3, 8, 8), np.float32)


@given(slope=st.floats(-0.9, 0.9), mean=st.lists(st.floats(-2, 2), min_size=3, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_noise_of_the_model_s_form_is_undone(slope: float, mean: list[float], seed: int) -> None:
    eps = outputs(seed)
    shift = np.array(mean, np.float32)[:, None, None]
    noisy = np.float32(1 + slope) * eps + shift
    fitted = fit_noise_correction({500: sum_noise(eps, noisy)})
    assert np.allclose(fitted.slope, slope, atol=ROUND_OFF)
    assert np.allclose(fitted.mean, [mean], atol=ROUND_OFF)
    assert np.allclose(fitted.apply(noisy, 500), eps, atol=ROUND_OFF / (1 + slope))
    assert fitted.apply(noisy, 500).dtype == np.float32


@given(slope=st.floats(-0.2, 0.2), noise=st.floats(0.001, 0.5), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_fit_never_lowers_the_sqnr_of_its_own_data(slope: float, noise: float, seed: int) -> None:
    eps = outputs(seed)
    noisy = np.float32(1 + slope) * eps + np.float32(noise) * outputs(seed + 100)
    fitted = fit_noise_correction({1: sum_noise(eps, noisy)})
    assert sqnr_db(eps, fitted.apply(noisy, 1)) >= sqnr_db(eps, noisy) - ROUND_OFF_DB


def test_a_slope_that_would_enlarge_the_rest_is_left_out() -> None:
    """k = -0.05 saves 0.0025 of the signal, dividing the rest (0.25) by 0.95**2 costs 0.027."""
    eps = outputs(0, batch=64)
    slope, mean = fit_step(sum_noise(eps, np.float32(0.95) * eps + np.float32(0.5) * outputs(1, batch=64)))
    assert slope == 0
    assert mean.shape == (3,)


def test_sums_stream() -> None:
    eps, noisy = outputs(0), outputs(1)
    whole = sum_noise(eps, noisy)
    parts = sum_noise(eps[:1], noisy[:1]) + sum_noise(eps[1:], noisy[1:])
    assert parts.count == whole.count == 4 * 64
    for name in ("eps", "noise", "eps_eps", "eps_noise", "noise_noise"):
        assert np.allclose(getattr(parts, name), getattr(whole, name))


@pytest.mark.parametrize(("t", "slope", "mean"), [(0, 0.1, 1), (10, 0.1, 1), (15, 0.2, 2), (20, 0.3, 3), (999, 0.3, 3)])
def test_between_timesteps_it_is_linear_and_beyond_them_constant(t: int, slope: float, mean: float) -> None:
    fitted = correction([10, 20], [0.1, 0.3], [[1, 0], [3, 0]]).interpolate(t)
    assert fitted[0] == pytest.approx(slope)
    assert fitted[1] == pytest.approx([mean, 0])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (([10], [1.5], [[0.0]]), r"slope of 1\.5"),
        (([10], [np.nan], [[0.0]]), "NaN"),
        (([10], [0.0], [[np.inf]]), "infinity"),
        (([20, 10], [0.0, 0.0], [[0.0], [0.0]]), "ascending"),
        (([10, 10], [0.0, 0.0], [[0.0], [0.0]]), "ascending"),
        (([-1], [0.0], [[0.0]]), "from 0 up"),
        (([10], [0.0, 0.0], [[0.0]]), "expected int64"),
        (([], [], []), "at least 1"),
        (([10], [0.0], [[0.0], [0.0]]), r"float32\[1, C\]"),
        (([10], [0.0], [0.0]), r"float32\[1, C\]"),
        (([10.5], [0.0], [[0.0]]), "float64"),
    ],
)
def test_values_that_cannot_be_are_refused(arrays: tuple, message: str) -> None:
    with pytest.raises(TableError, match=message):
        correction(*arrays)


def test_an_output_of_other_channels_is_refused() -> None:
    with pytest.raises(TableError, match=r"expected \[B, 2, h, w\]"):
        correction([10], [0.1], [[0, 0]]).apply(outputs(0), 10)
    with pytest.raises(TableError, match="equal shapes"):
        sum_noise(outputs(0), outputs(0, batch=1))
    with pytest.raises(TableError, match="no timestep"):
        fit_noise_correction({})


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    saved = correction([10, 20], [0.1, -0.3], [[1, 0], [3, 0.5]])
    path = tmp_path / "noise_correction.safetensors"
    save_noise_correction(path, saved)
    loaded = load_noise_correction(path)
    for name, array in saved.arrays().items():
        assert np.array_equal(loaded.arrays()[name], array)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise_correction.safetensors"
    with pytest.raises(TableError, match="not a readable"):
        load_noise_correction(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(TableError, match="not a readable"):
        load_noise_correction(path)
    save_file({"slope": np.zeros(1, np.float32)}, path)
    with pytest.raises(TableError, match=r"got arrays \['slope'\]"):
        load_noise_correction(path)
