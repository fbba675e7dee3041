"""A .tflite file that is cut, changed or made to harm is refused before LiteRT sees it."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qdeploy.artifacts.formats.tflite_files.file import check_model, read_tflite
from qdeploy.artifacts.formats.tflite_files.schema import IDENTIFIER, Model, Op, SoftmaxOptions, SubGraph
from qdeploy.base.errors import EngineError
from qdeploy.base.flatbuffer import decode, encode
from qdeploy.engines.base import EngineOptions
from qdeploy.engines.litert import open_session
from tests.targets.litert.running import build_graph, run_both
from tests.targets.litert.test_integer_layers import CASES

LOAD_AND_RUN = """
import sys, numpy as np
from ai_edge_litert.interpreter import Interpreter
for path in sys.argv[1:]:
    try:
        interpreter = Interpreter(path, num_threads=1)
        interpreter.allocate_tensors()
        runner = interpreter.get_signature_runner()
        feeds = {k: np.zeros(one["shape"], one["dtype"]) for k, one in runner.get_input_details().items()}
        runner(**feeds)
    except (ValueError, RuntimeError):
        pass
print("alive")
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tflite")
    body, x, constants = CASES["3x3"]
    whole = f'{body.replace("y =", "n =")} t = Softmax(n) r = Resize<mode = "nearest">(t, e, f) y = Sigmoid(r)'
    more = {"e": np.zeros(0, np.float32), "f": np.array([1, 1, 2, 2], np.float32)}
    run_both(build_graph(whole, {"x": x}, constants | more), {"x": x}, folder)
    return folder / "unet" / "model.tflite"


def read_model(file: Path) -> Model:
    return decode(Model, memoryview(file.read_bytes()), IDENTIFIER)


def test_it_names_its_ports(file: Path) -> None:
    found = read_tflite(file)
    assert {name: port.shape.tolist() for name, port in found.inputs.items()} == {"x": [2, 10, 8, 6]}
    assert {name: port.shape.tolist() for name, port in found.outputs.items()} == {"y": [2, 12, 16, 12]}


def set_input(graph: SubGraph, operator: int, tensor: int) -> None:
    graph.operators[operator].inputs[0] = tensor


HARMS: dict[str, tuple[Callable[[Model, SubGraph], object], str]] = {
    "another version": (lambda m, g: setattr(m, "version", 2), "schema version 3"),
    "two graphs": (lambda m, g: m.subgraphs.append(g), "one graph"),
    "no signature": (lambda m, g: m.signatures.clear(), "one signature"),
    "signature of no graph": (lambda m, g: setattr(m.signatures[0], "subgraph", 65280), "one signature"),
    "signature of another tensor": (lambda m, g: setattr(m.signatures[0].inputs[0], "tensor", 3), "signature"),
    "name twice": (lambda m, g: m.signatures[0].outputs.append(m.signatures[0].outputs[0]), "signature"),
    "tensor beyond": (lambda m, g: set_input(g, 0, 9999), "not there"),
    "negative tensor": (lambda m, g: set_input(g, 0, -7), "not there"),
    "order": (lambda m, g: g.operators.reverse(), "not computed yet"),
    "computed twice": (lambda m, g: g.operators.append(g.operators[-1]), "there already"),
    "output beyond": (lambda m, g: setattr(g, "outputs", np.array([10**6], np.int32)), "an output of the graph"),
    "buffer beyond": (lambda m, g: setattr(next(t for t in g.tensors if t.buffer), "buffer", 10**6), "buffer 1000000"),
    "content beyond": (lambda m, g: setattr(m.buffers[1], "offset", 2**60), "may be cut"),
    "content too short": (lambda m, g: setattr(m.buffers[1], "size", 1), "expected"),
    "huge shape": (lambda m, g: setattr(g.tensors[0], "shape", np.full(4, 2**30, np.int32)), "has the shape"),
    "negative side": (lambda m, g: setattr(g.tensors[0], "shape", np.array([-1, 4], np.int32)), "has the shape"),
    "element type": (lambda m, g: setattr(g.tensors[0], "type", 5), "element type 5"),
    "unknown operator": (lambda m, g: setattr(m.codes[0], "code", 32), "kind 32"),
    "old code": (lambda m, g: setattr(m.codes[0], "old_code", 32), "options of another"),
    "code beyond": (lambda m, g: setattr(g.operators[0], "code", 99), "code 99"),
    "foreign options": (lambda m, g: setattr(g.operators[0], "options", SoftmaxOptions(1.0)), "options of another"),
    "arity": (lambda m, g: setattr(g.operators[0], "inputs", np.zeros(5, np.int32)), "5 inputs"),
    "scales": (
        lambda m, g: setattr(
            next(t.quantization for t in g.tensors if t.quantization), "scale", np.ones(5, np.float32)
        ),
        "do not fit",
    ),
    "NaN scale": (
        lambda m, g: next(t.quantization for t in g.tensors if t.quantization).scale.fill(np.nan),
        "not all positive",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_harmful_file_is_refused(harm: str, file: Path, tmp_path: Path) -> None:
    edit, message = HARMS[harm]
    model = read_model(file)
    edit(model, model.subgraphs[0])
    with pytest.raises(ValueError, match=message):
        check_model(model, file.stat().st_size)
    header, whole = encode(model, IDENTIFIER), file.read_bytes()
    (tmp_path / "model.tflite").write_bytes(header + whole[len(header) :])
    with pytest.raises(EngineError, match=r"cannot load .*model\.tflite.*export the bundle again"):
        open_session(tmp_path / "model.tflite", EngineOptions())


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_is_refused(share: float, file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    (tmp_path / "cut.tflite").write_bytes(data[: int(share * len(data))])
    with pytest.raises(EngineError, match=r"cannot load .*cut\.tflite"):
        open_session(tmp_path / "cut.tflite", EngineOptions())


def test_what_passes_does_not_end_litert(file: Path, tmp_path: Path) -> None:
    """Files with changed numbers that are not refused are loaded and run in a process of their own."""
    data, rng = file.read_bytes(), random.Random(2)
    end = min(buffer.offset for buffer in read_model(file).buffers[1:])
    passed = []
    for number in range(1500):
        broken = bytearray(data)
        place = rng.randrange(end)
        broken[place] = rng.choice([0, 1, 255, broken[place] ^ 1 << rng.randrange(8)])
        path = tmp_path / f"{number}.tflite"
        path.write_bytes(broken)
        try:
            read_tflite(path)
        except ValueError:
            path.unlink()
        else:
            passed.append(str(path))
    assert 50 < len(passed) < 1200
    ended = subprocess.run([sys.executable, "-c", LOAD_AND_RUN, *passed], capture_output=True, text=True, check=False)
    assert ended.stdout == "alive\n", ended.stderr[-500:]


def test_operators_have_their_arity() -> None:
    from qdeploy.artifacts.formats.tflite_files.file import ARITY

    assert set(Op) - set(ARITY) == {Op.CONCATENATION}
