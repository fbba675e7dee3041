"""Integer layers are exact for the largest codes: sums that leave 16 and 24 bits, in each form of kernel."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qdeploy.artifacts.formats.ncnn_files.graph import INT8_TAG, NcnnGraph
from qdeploy.artifacts.formats.ncnn_files.layers import apply_rule
from qdeploy.artifacts.formats.ncnn_files.param import Layer, format_param
from qdeploy.artifacts.formats.ncnn_files.ports import Ports
from qdeploy.engines.base import EngineOptions, load_engine
from qdeploy.engines.ncnn import WINOGRAD, has_large_pictures, load_net, read_checked

LARGEST = 127
CONVOLUTIONS = {
    "3x3": (320, 3, 1), "3x3 of 64 channels": (64, 3, 1), "3x3 of 1920 channels": (1920, 3, 1),
    "3x3 of stride 2": (320, 3, 2), "1x1": (1280, 1, 1), "3x3 of 5 channels": (5, 3, 1),
}  # channels, kernel, stride  # fmt: skip
SIDE, OUTPUTS = 12, 32
RTOL = 1e-6  # the exact sum in float32

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def installed() -> None:
    pytest.importorskip("ncnn", reason="ncnn is not installed")


def write_net(folder: Path, layer: Layer, shape: tuple[int, ...], output: tuple[int, ...], codes: NDArray) -> Path:
    """A net of one integer layer whose scales are 1."""
    keys = (0, 1, 2)[: len(shape)]
    inputs = Layer("Input", "x", (), ("x",), dict(zip(keys, reversed(shape), strict=True)))
    (folder / "model.ncnn.param").write_text(format_param([inputs, layer]))
    scales = np.ones(len(codes) + 1, "<f4")
    data = INT8_TAG.to_bytes(4, "little") + codes.astype(np.int8).tobytes() + bytes(-codes.size % 4) + scales.tobytes()
    (folder / "model.ncnn.bin").write_bytes(data)
    ports = {"inputs": {"x": (1, *shape)}, "outputs": {"y": (1, *output)}}
    document = {
        group: {name: {"dtype": "float32", "shape": list(sides)} for name, sides in of_group.items()}
        for group, of_group in ports.items()
    }
    (folder / "model.ports.json").write_text(json.dumps(document))
    return folder / "model.ncnn.param"


def write_convolution(folder: Path, channels: int, kernel: int, stride: int) -> Path:
    """All codes the largest."""
    pad, side = kernel // 2, (SIDE - 1) // stride + 1
    params = {0: OUTPUTS, 1: kernel, 3: stride, 4: pad, 5: 0, 6: OUTPUTS * channels * kernel**2, 8: 1}
    codes = np.full((OUTPUTS, channels, kernel, kernel), LARGEST)
    layer = Layer("Convolution", "y", ("x",), ("y",), dict(params))
    return write_net(folder, layer, (channels, SIDE, SIDE), (OUTPUTS, side, side), codes)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_of_the_largest_codes(case: str, tmp_path: Path) -> None:
    channels, kernel, stride = CONVOLUTIONS[case]
    path = write_convolution(tmp_path, channels, kernel, stride)
    x = np.full((1, channels, SIDE, SIDE), LARGEST, np.float32)
    actual = load_engine("ncnn").open_session(path, EngineOptions(threads=1)).run({"x": x})["y"]
    middle = actual[0, :, 2:-2, 2:-2]
    np.testing.assert_allclose(middle, np.full_like(middle, channels * kernel**2 * LARGEST**2), rtol=RTOL)


@pytest.mark.parametrize("inputs", [64, 1280, 5120])
@pytest.mark.parametrize("rows", [1, 77])
def test_a_linear_layer_of_the_largest_codes(inputs: int, rows: int, tmp_path: Path) -> None:
    layer = Layer("InnerProduct", "y", ("x",), ("y",), {0: OUTPUTS, 1: 0, 2: OUTPUTS * inputs, 8: 1})
    path = write_net(tmp_path, layer, (rows, inputs), (rows, OUTPUTS), np.full((OUTPUTS, inputs), LARGEST))
    x = np.full((1, rows, inputs), -LARGEST, np.float32)
    actual = load_engine("ncnn").open_session(path, EngineOptions(threads=1)).run({"x": x})["y"]
    np.testing.assert_allclose(actual, np.full((1, rows, OUTPUTS), -inputs * LARGEST**2), rtol=RTOL)


def test_random_codes_are_exact(tmp_path: Path) -> None:
    """Against NumPy's product, every code of the input its own."""
    noise = np.random.default_rng(0)
    codes, x = noise.integers(-LARGEST, LARGEST + 1, (OUTPUTS, 640)), noise.integers(-LARGEST, LARGEST + 1, (16, 640))
    layer = Layer("InnerProduct", "y", ("x",), ("y",), {0: OUTPUTS, 1: 0, 2: codes.size, 8: 1})
    path = write_net(tmp_path, layer, x.shape, (16, OUTPUTS), codes)
    actual = (
        load_engine("ncnn").open_session(path, EngineOptions(threads=1)).run({"x": x[None].astype(np.float32)})["y"]
    )
    assert np.array_equal(actual[0], x @ codes.T)


def test_the_option_is_off_in_int8_and_ncnn_has_it(tmp_path: Path) -> None:
    """An option of another name would be set without effect, and the kernel would overflow again."""
    import ncnn

    assert getattr(ncnn.Net().opt, WINOGRAD) is True
    path = write_convolution(tmp_path, 64, 3, 1)
    assert getattr(load_net(ncnn, path, read_checked(path), EngineOptions()).opt, WINOGRAD) is False
    assert prod((64, 3, 3)) * LARGEST**2 * 576 > 2**31
    graph = read_checked(path)
    floats = replace(graph, layers=graph.layers[:1], results=graph.results[:1])
    assert getattr(load_net(ncnn, path, floats, EngineOptions()).opt, WINOGRAD) is True


@pytest.mark.parametrize(("side", "is_large"), [(4, False), (15, False), (16, True), (64, True)])
def test_floats_take_large_tiles_on_large_pictures(side: int, is_large: bool) -> None:
    """Most of the work counts: ncnn has one option for all layers."""
    layer = Layer("Convolution", "y", ("x",), ("y",), {0: 8, 1: 3, 4: 1, 6: 8 * 8 * 9})
    result = apply_rule(layer, [(8, side, side)])
    small = apply_rule(layer, [(8, 2, 2)])
    ports = Ports({}, {})
    assert has_large_pictures(NcnnGraph((layer, layer), (result, small), {}, ports)) is is_large
