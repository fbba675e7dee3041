"""Processors that tests pretend to run on, on any machine: with VNNI, without, and unknown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.numpy_helper import to_array

from qdeploy.base.cpu import FLAGS_VARIABLE
from qdeploy.base.numerics import pair_sum_bounds

SETTINGS = {
    "vnni": "avx2,avx512f,avx512_vnni",
    "no-vnni": "avx2,avx512f",
    "untold": "unknown",  # no /proc/cpuinfo, as on macOS and Windows
}
WITHOUT_VNNI = ("no-vnni", "untold")

every_processor = pytest.mark.parametrize("processor", SETTINGS)
without_vnni = pytest.mark.parametrize("processor", WITHOUT_VNNI)


def pretend_processor(monkeypatch: pytest.MonkeyPatch, processor: str) -> None:
    """Let qdeploy take this machine's processor for one of SETTINGS."""
    monkeypatch.setenv(FLAGS_VARIABLE, SETTINGS[processor])


def find_saturating_weights(folder: Path) -> list[str]:
    """Integer weights below ``folder`` for which some pair of products does not fit 16 bits."""
    bounds = np.iinfo(np.int16)
    sums = {name: pair_sum_bounds(codes) for name, codes in iter_weight_codes(folder)}
    assert sums, f"{folder} holds no integer weights"
    return [name for name, (low, high) in sums.items() if low < bounds.min or high > bounds.max]


def iter_weight_codes(folder: Path) -> Iterator[tuple[str, NDArray[np.int8]]]:
    """Name and codes ``int8[out, ...]`` of every integer weight below ``folder``."""
    for path in sorted(folder.glob("*/model.onnx")):
        graph = onnx.load(path).graph
        columns = {name for node in graph.node if node.op_type == "MatMulIntegerToFloat" for name in node.input[1:2]}
        for initializer in graph.initializer:
            if initializer.data_type in (TensorProto.INT8, TensorProto.INT4) and len(initializer.dims) > 1:
                codes = to_array(initializer).astype(np.int8)
                yield initializer.name, codes.T if initializer.name in columns else codes
