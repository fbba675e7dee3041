"""The audit on graphs of a few nodes, right ones and ones that were broken on purpose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qdeploy.base.errors import ExportError, UsageError
from qdeploy.export.audit import Finding, audit_graph
from qdeploy.inspection.audit import describe_audit, make_example_feeds

NOISE = np.random.default_rng(0)
CONSTANTS = {
    "s": np.float32(0.03),
    "z": np.uint8(128),
    "ws": np.full(8, 0.01, np.float32),
    "w": NOISE.integers(-127, 128, (8, 4, 3, 3), np.int8),
    "wf": NOISE.standard_normal((8, 4, 3, 3), np.float32),
    "m": NOISE.integers(-127, 128, (16, 8), np.int8),
}
QUANTIZED = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
CONV = f"{QUANTIZED} wd = DequantizeLinear <axis = 0> (w, ws) c = Conv <pads = [1, 1, 1, 1]> (d, wd)"
AND_Q = "cq = QuantizeLinear(c, s, z) y = DequantizeLinear(cq, s, z)"


def graph(folder: Path, body: str, inner: str = "", sizes: str = "2,4,6,5") -> Path:
    header = f'<ir_version: 10, opset_import: ["" : 20]> g (float[{sizes}] x) => (float[?,?,?,?] y) <{inner}>'
    model = onnx.parser.parse_model(f"{header} {{ {body} }}")
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in CONSTANTS.items() if n in read)
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    onnx.save(onnx.shape_inference.infer_shapes(model), folder / "g.onnx")
    return folder / "g.onnx"


def only_finding(path: Path, engine: str = "ort-cpu") -> Finding:
    (finding,) = audit_graph(path, engine).findings
    return finding


def test_an_integer_convolution(tmp_path: Path) -> None:
    finding = only_finding(graph(tmp_path, f"{CONV} {AND_Q}"))
    assert finding == Finding("node_c", "QLinearConv", 2 * 8 * 6 * 5 * 4 * 3 * 3, quantized=True, integer=True)
    assert finding.reason == ""


def test_without_q_after_it_onnx_runtime_computes_in_float_and_openvino_does_not(tmp_path: Path) -> None:
    path = graph(tmp_path, f"{CONV} y = Relu(c)")
    finding = only_finding(path)
    assert not finding.integer
    assert finding.reason.startswith("quantized in the graph, but runs as ")
    pytest.importorskip("openvino", reason="openvino is not installed")
    assert only_finding(path, "openvino").integer


def test_a_layer_that_was_left_in_float(tmp_path: Path) -> None:
    finding = only_finding(graph(tmp_path, "y = Conv <pads = [1, 1, 1, 1]> (x, wf)"))
    assert (finding.quantized, finding.integer) == (False, False)
    assert finding.reason == "float in the graph, by choice"


def test_only_a_weight_in_integers_is_not_quantized(tmp_path: Path) -> None:
    path = graph(tmp_path, "wd = DequantizeLinear <axis = 0> (w, ws) y = Conv(x, wd)")
    assert not only_finding(path).quantized


def test_products_of_activations_count_too(tmp_path: Path) -> None:
    path = graph(tmp_path, f"{QUANTIZED} t = Transpose <perm = [0, 1, 3, 2]> (d) y = MatMul(d, t)")
    finding = only_finding(path)
    assert finding.macs == 2 * 4 * 6 * 6 * 5
    assert finding.integer


def test_the_share_weighs_by_macs(tmp_path: Path) -> None:
    body = f"{CONV} {AND_Q.replace(' y ', ' e ')} f = Transpose <perm = [0, 2, 3, 1]> (e) y = MatMul(f, f2)"
    CONSTANTS["f2"] = NOISE.standard_normal((8, 3), np.float32)
    audit = audit_graph(graph(tmp_path, body), "ort-cpu")
    conv, product = (finding.macs for finding in audit.findings)
    assert product == 2 * 6 * 5 * 3 * 8
    assert audit.integer_mac_share == pytest.approx(conv / (conv + product))


def test_time_is_listed_by_kind_of_node(tmp_path: Path) -> None:
    path = graph(tmp_path, f"{CONV} {AND_Q}")
    assert audit_graph(path, "ort-cpu").seconds_by_op() == {}
    audit = audit_graph(path, "ort-cpu", feeds=make_example_feeds(path))
    spent = audit.seconds_by_op()
    assert spent["QLinearConv"][0] == 1
    assert all(seconds > 0 for _, seconds in spent.values())
    assert 0 < audit.time_share(["QuantizeLinear", "DequantizeLinear"]) < 1
    assert audit.time_share(spent) == pytest.approx(1)


def test_the_rows_name_what_is_float_and_why(tmp_path: Path) -> None:
    facts = describe_audit(graph(tmp_path, f"{CONV} y = Relu(c)"), threads=1)
    assert ("g", "0.0% of MACs in integers") in facts
    assert any(value.startswith("node_c: quantized in the graph, but runs as ") for _, value in facts)
    assert any(label == "  time" for label, _ in facts)


def test_an_open_shape_is_refused(tmp_path: Path) -> None:
    path = graph(tmp_path, "y = Conv <pads = [1, 1, 1, 1]> (x, wf)", sizes="N,4,6,5")
    with pytest.raises(ExportError, match="no static shape"):
        audit_graph(path, "ort-cpu")


def test_what_is_neither_bundle_nor_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither"):
        describe_audit(tmp_path)
