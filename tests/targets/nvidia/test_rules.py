"""TensorRT's rules, each broken on a graph of a few nodes; its library must refuse what it is said to refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from qdeploy.base.errors import AuditError, EngineUnavailableError
from qdeploy.targets.nvidia.rules import check_rules, find_broken_rules
from qdeploy.targets.nvidia.trial_build import build_on_trial, find_library_folder

NOISE = np.random.default_rng(0)
CONSTANTS = {
    "s": np.float16(0.03),
    "z": np.int8(0),
    "z3": np.int8(3),
    "u": np.uint8(0),
    "s4": np.full(4, 0.03, np.float16),
    "zero": np.float16(0),
    "w": NOISE.integers(-127, 128, (8, 4, 3, 3), np.int8),
    "ws": np.full(8, 0.01, np.float16),
    "b": NOISE.standard_normal(8).astype(np.float16),
    "bad": np.array([np.inf] * 8, np.float16),
    "codes": np.ones(8, np.int32),
    "low": np.int8(-8),
    "high": np.int8(7),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "none": np.float16(0),
}
Q = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
W = "wd = DequantizeLinear <axis = 0> (w, ws)"
RIGHT = f"{Q} {W} y = Conv <pads = [1, 1, 1, 1]> (d, wd, b)"
CASES = {
    "a zero point": (RIGHT.replace("s, z)", "s, z3)"), "zero point z3 is not 0", True),
    "unsigned codes": (RIGHT.replace("s, z)", "s, u)"), "expected INT8", False),
    "a scale of zero": (RIGHT.replace("(w, ws)", "(w, zero)"), "scale zero is no finite positive constant", False),
    "a scale for each channel": (RIGHT.replace("s, z)", "s4)"), "a scale for each channel", False),
    "Clip after a weight": (
        RIGHT.replace("wd =", "c = Clip(w, low, high) wd =").replace("(w, ws)", "(c, ws)"),
        "a scale for each channel after Clip",
        True,
    ),
    "an integer bias": (
        f"{Q} {W} bd = DequantizeLinear <axis = 0> (codes, ws) y = Conv <pads = [1, 1, 1, 1]> (d, wd, bd)",
        "bias bd is no float constant",
        True,
    ),
    "Q after Pad": (
        f"p = Pad(x, pads, none) {Q.replace('(x', '(p')} {W} y = Conv (d, wd, b)",
        "Q or DQ between node_p and the convolution",
        False,
    ),
    "infinity": (RIGHT.replace("wd, b)", "wd, bad)"), "constant bad is not finite", False),
}


def graph(body: str, opset: int = 20, size: str = "2,4,6,5") -> onnx.ModelProto:
    header = f'<ir_version: 10, opset_import: ["" : {opset}]> g (float16[{size}] x) => (float16[?,?,?,?] y)'
    model = onnx.parser.parse_model(f"{header} {{ {body} }}")
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in CONSTANTS.items() if n in read)
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    return onnx.shape_inference.infer_shapes(model)


def find_broken(model: onnx.ModelProto) -> list[str]:
    return list(find_broken_rules(ir.from_proto(model)))


def save_graph(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "g.onnx")
    return folder / "g.onnx"


@pytest.fixture
def library() -> None:
    try:
        find_library_folder()
    except EngineUnavailableError as exc:
        pytest.skip(str(exc))


def test_a_right_graph_breaks_no_rule() -> None:
    assert find_broken(graph(RIGHT)) == []


@pytest.mark.parametrize("case", CASES)
def test_a_broken_rule_is_named(case: str) -> None:
    body, what, _ = CASES[case]
    model = graph(body)
    assert what in " ".join(find_broken(model))
    with pytest.raises(AuditError, match="TensorRT would refuse"):
        check_rules(ir.from_proto(model), "unet")


@pytest.mark.parametrize(
    ("opset", "size", "what"), [(18, "2,4,6,5", "opset 18, expected 19"), (20, "N,4,6,5", "the open or empty shape")]
)
def test_sizes_and_opset_are_checked(opset: int, size: str, what: str) -> None:
    assert what in " ".join(find_broken(graph("y = Relu(x)", opset, size)))


@pytest.mark.usefixtures("library")
def test_the_library_builds_a_right_graph(tmp_path: Path) -> None:
    trial = build_on_trial(save_graph(graph(RIGHT), tmp_path))
    assert trial.engine_bytes > 1000
    assert trial.library.startswith("TensorRT-RTX ")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("case", [name for name, (_, _, refused) in CASES.items() if refused])
def test_the_library_refuses_the_same(case: str, tmp_path: Path) -> None:
    path = save_graph(graph(CASES[case][0]), tmp_path)
    with pytest.raises(AuditError, match=r"TensorRT-RTX [\d.]+ refuses"):
        build_on_trial(path)


@pytest.mark.usefixtures("library")
def test_an_open_batch_has_no_profile(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="profile"):
        build_on_trial(save_graph(graph("y = Relu(x)", size="N,4,6,5"), tmp_path))


@pytest.mark.usefixtures("library")
def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"not a graph")
    with pytest.raises(AuditError, match=r"g\.onnx"):
        build_on_trial(tmp_path / "g.onnx")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdeploy.targets.nvidia.trial_build.find_spec", lambda _: None)
    with pytest.raises(EngineUnavailableError, match=r"pip install 'qdeploy\[tensorrt-rtx\]'"):
        build_on_trial(tmp_path / "g.onnx")
