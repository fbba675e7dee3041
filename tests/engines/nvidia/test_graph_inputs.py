"""The little ONNX reader against the package ``onnx``, and on files that are none."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.base.errors import EngineError
from qdeploy.engines.base import OPEN_DIM, Port
from qdeploy.engines.nvidia.graph_inputs import is_static, read_inputs


def test_a_bundles_graphs(float_bundle: Path) -> None:
    for info in open_bundle(float_bundle).manifest.components.values():
        expected = [Port(name, np.dtype(one.dtype), one.shape) for name, one in info.inputs.items()]
        assert read_inputs(float_bundle / info.file) == expected
        assert is_static(float_bundle / info.file)


def test_open_dimensions_and_constants(tmp_path: Path) -> None:
    """A constant that is listed as an input too, as old files do, is none."""
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", 4, None]),
        helper.make_tensor_value_info("w", TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info("t", TensorProto.INT64, []),
    ]
    node = helper.make_node("Identity", ["x"], ["y"])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    weight = numpy_helper.from_array(np.ones(1, np.float32), "w")
    onnx.save(helper.make_model(helper.make_graph([node], "g", inputs, [output], [weight])), tmp_path / "g.onnx")
    assert read_inputs(tmp_path / "g.onnx") == [
        Port("x", np.dtype(np.float16), (OPEN_DIM, 4, OPEN_DIM)),
        Port("t", np.dtype(np.int64), ()),
    ]
    assert not is_static(tmp_path / "g.onnx")


def test_broken_files_are_refused_never_misread(float_bundle: Path, tmp_path: Path) -> None:
    good = (float_bundle / "text_encoder" / "model.onnx").read_bytes()
    rng = np.random.default_rng(0)
    broken = tmp_path / "broken.onnx"
    for content in (b"", b"not a graph", good[:50], good[: len(good) // 2], b"\xff" * 100):
        broken.write_bytes(content)
        with pytest.raises(EngineError, match=r"broken\.onnx is not a readable ONNX graph"):
            read_inputs(broken)
    for _ in range(200):
        content = bytearray(good)
        content[rng.integers(len(content))] = rng.integers(256)
        broken.write_bytes(content)
        with contextlib.suppress(EngineError):  # any other error fails
            read_inputs(broken)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"nowhere\.onnx"):
        read_inputs(tmp_path / "nowhere.onnx")
