"""The engines' arithmetic on processors with and without VNNI, on any machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qdeploy.base.errors import EngineError
from qdeploy.base.numerics import HALF_RANGE_MAX
from qdeploy.engines import openvino, ort_cpu
from qdeploy.engines.base import EngineOptions, load_engine
from tests.engines.test_contract import save_model, tensor
from tests.processors import every_processor, pretend_processor, without_vnni

PRECISION = "session.x64quantprecision"
K = 64
RTOL = 1e-5  # float32 rounding of the scales' product


def integer_graph(path: Path, code: int) -> Path:
    """``y = x @ W`` with u8 activations and every weight code ``code``; the sums need more than 16 bits."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_codes"]),
        helper.make_node("DequantizeLinear", ["x_codes", "x_scale", "x_zero"], ["x_real"]),
        helper.make_node("DequantizeLinear", ["codes", "w_scale"], ["weight"], axis=1),
        helper.make_node("MatMul", ["x_real", "weight"], ["y"], name="product"),
    ]
    constants = {
        "x_scale": np.float32(1 / 255),
        "x_zero": np.uint8(0),
        "codes": np.full((K, 16), code, np.int8),
        "w_scale": np.full(16, 0.01, np.float32),
    }
    inputs, outputs = [tensor("x", TensorProto.FLOAT, [1, 4, K])], [tensor("y", TensorProto.FLOAT, [1, 4, 16])]
    return save_model(nodes, inputs, outputs, constants, path)


def precision_option(options: EngineOptions) -> bool:
    try:
        return ort_cpu._build_settings(options).get_session_config_entry(PRECISION) == "1"
    except RuntimeError:  # ONNX Runtime raises where an entry was not made
        return False


@every_processor
@pytest.mark.parametrize(("code", "needed_without"), [(0, False), (8, False), (64, False), (65, True), (None, True)])
def test_the_slow_option_is_set_only_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, processor: str, code: int | None, needed_without: bool
) -> None:
    pretend_processor(monkeypatch, processor)
    assert precision_option(EngineOptions(largest_weight_code=code)) == (needed_without and processor != "vnni")


def test_simulated_qdq_needs_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_processor(monkeypatch, "no-vnni")
    assert not precision_option(EngineOptions(simulate_qdq=True))


@every_processor
@pytest.mark.parametrize("options", [EngineOptions(), EngineOptions(simulate_qdq=True)])
@pytest.mark.parametrize("code", [HALF_RANGE_MAX, 127, -127])
def test_onnx_runtime_is_exact_on_every_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processor: str, options: EngineOptions, code: int
) -> None:
    pretend_processor(monkeypatch, processor)
    session = load_engine("ort-cpu").open_session(integer_graph(tmp_path / "m.onnx", code), options)
    y = session.run({"x": np.ones((1, 4, K), np.float32)})["y"]
    np.testing.assert_allclose(y, np.full((1, 4, 16), K * code * 0.01, np.float32), rtol=RTOL)


@without_vnni
@pytest.mark.parametrize("known", [True, False])
def test_openvino_refuses_what_it_would_saturate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processor: str, known: bool
) -> None:
    """By the manifest's word, and by the file itself where there is none."""
    pretend_processor(monkeypatch, processor)
    with pytest.raises(EngineError, match=r"codes up to 65.*without --full-range"):
        openvino.open_session(
            integer_graph(tmp_path / "m.onnx", HALF_RANGE_MAX + 1),
            EngineOptions(largest_weight_code=HALF_RANGE_MAX + 1 if known else None),
        )


@every_processor
@pytest.mark.parametrize("known", [True, False])
def test_openvino_runs_half_the_range(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processor: str, known: bool
) -> None:
    pretend_processor(monkeypatch, processor)
    options = EngineOptions(largest_weight_code=HALF_RANGE_MAX if known else None)
    session = openvino.open_session(integer_graph(tmp_path / "m.onnx", HALF_RANGE_MAX), options)
    y = session.run({"x": np.ones((1, 4, K), np.float32)})["y"]
    np.testing.assert_allclose(y, np.full((1, 4, 16), K * HALF_RANGE_MAX * 0.01, np.float32), rtol=RTOL)


def test_openvino_reads_the_largest_code_off_int4_too(int4_graph: Path) -> None:
    import openvino as ov

    assert openvino._find_largest_code(ov.Core().read_model(int4_graph)) == 8


@pytest.fixture
def int4_graph(tmp_path: Path) -> Path:
    weight = helper.make_tensor("codes", TensorProto.INT4, [K, 2], [7, -8] * K)
    nodes = [
        helper.make_node("Cast", ["codes"], ["int8"], to=TensorProto.INT8),
        helper.make_node("DequantizeLinear", ["int8", "scale"], ["weight"], axis=1),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [2], [0.5, 0.5])
    inputs, outputs = [tensor("x", TensorProto.FLOAT, [1, K])], [tensor("y", TensorProto.FLOAT, [1, 2])]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, [weight, scale])
    path = tmp_path / "int4.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path
