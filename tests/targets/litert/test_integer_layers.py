"""Layers of the table in LiteRT: the integers of a static quantization, by a quantization that LiteRT does itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qdeploy.artifacts.formats.tflite_files.file import TfliteFile
from qdeploy.artifacts.formats.tflite_files.schema import DTYPES, Op
from qdeploy.base.errors import ExportError
from qdeploy.base.numerics import sqnr_db
from qdeploy.engines.base import EngineOptions
from qdeploy.engines.litert import kernels
from tests.targets.litert.running import build_graph, run_both

RNG = np.random.default_rng(1)
SAME_INTEGERS_DB = 110.0  # what float32 sums leave; one code that was rounded otherwise leaves about 60
SCALE, ZERO_POINT = np.float32(0.02), np.uint8(97)  # -1.94..3.16: standard normal values are cut at both ends
FACTOR = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
LINEAR = f"{FACTOR} w = DequantizeLinear<axis = 1>(codes, ws) m = MatMul(d, w) y = Add(m, b)"
CONV = f"{FACTOR} w = DequantizeLinear<axis = 0>(codes, ws) y = Conv<pads = [1,1,1,1]>(d, w, b)"
STRIDED = CONV.replace("pads =", "strides = [2,2], pads =")
POINTWISE = f"{FACTOR} w = DequantizeLinear<axis = 0>(codes, ws) y = Conv(d, w, b)"


def make_constants(*codes_shape: int, outputs: int, bias_shape: tuple[int, ...]) -> dict[str, NDArray]:
    return {
        "s": SCALE,
        "z": ZERO_POINT,
        "codes": RNG.integers(-127, 128, codes_shape).astype(np.int8),
        "ws": RNG.uniform(0.001, 0.01, outputs).astype(np.float32),
        "b": RNG.standard_normal(outputs).astype(np.float32).reshape(bias_shape),
    }


LINEAR_CONSTANTS = make_constants(64, 24, outputs=24, bias_shape=(1, 1, 24))
TOKENS = RNG.standard_normal((2, 17, 64)).astype(np.float32)
PICTURE = RNG.standard_normal((2, 10, 8, 6)).astype(np.float32)
CASES = {
    "linear": (LINEAR, TOKENS, LINEAR_CONSTANTS),
    "3x3": (CONV, PICTURE, make_constants(12, 10, 3, 3, outputs=12, bias_shape=(12,))),
    "stride 2": (STRIDED, PICTURE, make_constants(12, 10, 3, 3, outputs=12, bias_shape=(12,))),
    "1x1": (POINTWISE, PICTURE, make_constants(12, 10, 1, 1, outputs=12, bias_shape=(12,))),
}


def run_case(case: str, x: NDArray, folder: Path) -> tuple[NDArray, NDArray, TfliteFile]:
    body, _, constants = CASES[case]
    return run_both(build_graph(body, {"x": x}, constants), {"x": x}, folder)


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_that_of_the_static_range(case: str, tmp_path: Path) -> None:
    expected, actual, _ = run_case(case, CASES[case][1], tmp_path)
    assert sqnr_db(expected, actual) > SAME_INTEGERS_DB


@pytest.mark.parametrize("case", CASES)
def test_whatever_the_input_the_range_is_the_tables(case: str, tmp_path: Path) -> None:
    """Values far below and far above the range: its own least and largest value would give other steps."""
    for number, factor in enumerate((0.01, 100.0)):
        (tmp_path / str(number)).mkdir()
        expected, actual, _ = run_case(case, CASES[case][1] * np.float32(factor), tmp_path / str(number))
        assert sqnr_db(expected, actual) > SAME_INTEGERS_DB


@pytest.mark.parametrize("case", CASES)
def test_its_codes_are_in_the_file_unchanged(case: str, tmp_path: Path) -> None:
    *_, file = run_case(case, CASES[case][1], tmp_path)
    (operator,) = [one for op, one in file.iter_operators() if op in (Op.CONV_2D, Op.FULLY_CONNECTED)]
    weight = file.tensor(operator.inputs[1])
    assert DTYPES[weight.type] == "int8"
    assert weight.quantization is not None
    assert np.array_equal(weight.quantization.scale, CASES[case][2]["ws"])
    data = (tmp_path / "unet" / "model.tflite").read_bytes()
    stored = np.frombuffer(data, np.int8)
    codes = CASES[case][2]["codes"]
    rows = codes.T if codes.ndim == 2 else codes.transpose(0, 2, 3, 1)
    first = rows.reshape(-1, rows.shape[-1])[0].tobytes() + b"\0\0"  # two channels without weight: the range's ends
    assert first in stored.tobytes()


@pytest.mark.parametrize("case", CASES)
def test_xnnpack_takes_all_of_it(case: str, tmp_path: Path) -> None:
    run_case(case, CASES[case][1], tmp_path)
    found = kernels(tmp_path / "unet" / "model.tflite", EngineOptions())
    assert all(kernel.op_type.endswith(" XNNPACK") for kernel in found)
    assert [kernel.op_type for kernel in found if kernel.integer] in (["CONV_2D XNNPACK"], ["FULLY_CONNECTED XNNPACK"])


def test_layers_of_one_input_share_what_is_pinned(tmp_path: Path) -> None:
    body = f"{LINEAR.replace('y =', 'n =')} v = DequantizeLinear<axis = 1>(codes, ws) o = MatMul(d, v) y = Mul(n, o)"
    graph = build_graph(body, {"x": TOKENS}, LINEAR_CONSTANTS)
    expected, actual, file = run_both(graph, {"x": TOKENS}, tmp_path)
    assert file.ops.count(Op.CONCATENATION) == 1
    assert sqnr_db(expected, actual) > SAME_INTEGERS_DB


def test_a_second_pass_reads_what_the_first_rounded_off(tmp_path: Path) -> None:
    body = (
        f"{LINEAR.replace('y =', 'n =')} r = Sub(x, d) rq = QuantizeLinear(r, rs, rz) "
        "rd = DequantizeLinear(rq, rs, rz) o = MatMul(rd, w) y = Add(n, o)"
    )
    constants = LINEAR_CONSTANTS | {"rs": np.float32(SCALE / 255), "rz": np.uint8(128)}
    x = np.clip(TOKENS, -1.9, 3.1)
    graph = build_graph(body, {"x": x}, constants)
    expected, actual, _ = run_both(graph, {"x": x}, tmp_path)
    assert sqnr_db(expected, actual) > SAME_INTEGERS_DB
    exact = x @ (constants["codes"] * constants["ws"]) + constants["b"]
    assert sqnr_db(exact, actual) > 80  # 16 bits; one pass has about 40


def test_a_quantized_weight_with_a_float_input_is_refused(tmp_path: Path) -> None:
    body = LINEAR.replace("MatMul(d, w)", "MatMul(x, w)")
    with pytest.raises(ExportError, match="its weight is quantized and its input is not"):
        run_both(build_graph(body, {"x": TOKENS}, LINEAR_CONSTANTS), {"x": TOKENS}, tmp_path)
