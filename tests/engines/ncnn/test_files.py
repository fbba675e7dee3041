"""ncnn's files: parsed strictly, checked against each other, and never shown to ncnn where they do not fit.

ncnn reads past the end of its buffers, or ends the process, on most of what is refused here.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qdeploy.artifacts.formats.ncnn_files.graph import name_bin, read_ncnn_graph
from qdeploy.artifacts.formats.ncnn_files.param import Layer, format_param, parse_param
from qdeploy.base.errors import EngineError
from qdeploy.engines.base import EngineOptions, load_engine
from qdeploy.engines.ncnn import read_checked
from tests.hostile.mutate import mutate_bytes

PARAM = (
    "7767517\n4 3\nInput x 0 1 x 0=5 1=4 2=3\n"
    "Convolution c 1 1 x c 0=2 1=3 4=1 5=1 6=54 8=1\n"
    "Swish s 1 1 c s\nReshape y 1 1 s y 0=20 1=2\n"
).replace("4 3", "4 4")
PORTS = {
    "inputs": {"x": {"dtype": "float32", "shape": [2, 3, 4, 5]}},
    "outputs": {"y": {"dtype": "float32", "shape": [2, 2, 20]}},
}
INT8 = bytes.fromhex("384b0d00")
WEIGHTS = INT8 + bytes(56) + bytes(4 * (2 + 2 + 1))
BROKEN = {
    "another magic": ("7767517", "7767516"),
    "more layers than it says": ("4 4", "3 4"),
    "more blobs than it says": ("4 4", "4 5"),
    "a count of a hundred million": ("4 4", "100000000 4"),
    "an unknown layer": ("Swish", "ArgMax"),
    "a layer that ncnn would load from a library": ("Swish", "./evil.so"),
    "a layer without a name": ("Swish s", "Swish"),
    "a number of inputs that is none": ("Swish s 1 1", "Swish s -1 1"),
    "inputs without end": ("Swish s 1 1", "Swish s 99999 1"),
    "an input that nothing writes": ("s 1 1 c s", "s 1 1 z s"),
    "an output that is written twice": ("Swish s 1 1 c s", "Swish s 1 1 c c"),
    "a blob that is read twice": ("1 1 s y", "1 1 c y"),
    "a name that two layers have": ("Swish s", "Swish c"),
    "a setting beyond ncnn's": ("8=1", "8=1 99=1"),
    "a setting twice": ("8=1", "8=1 8=0"),
    "a setting that is a text": ("5=1", "5=one"),
    "a number of 40 digits": ("6=54", f"6={'9' * 40}"),
    "a negative size": ("0=2 1=3", "0=-2 1=3"),
    "more outputs than weights": ("0=2 1=3", "0=3 1=3"),
    "a kernel larger than the image": ("1=3 4=1", "1=3 2=9 4=1"),
    "a stride of zero": ("1=3 4=1", "1=3 3=0 4=1"),
    "a padding without end": ("4=1", "4=2000000000"),
    "an activation that is not ours": ("8=1", "8=1 9=1"),
    "a size that does not fit": ("0=20 1=2", "0=21 1=2"),
    "a size to be guessed": ("0=20 1=2", "0=20 1=-1"),
    "an input of another size": ("0=5 1=4 2=3", "0=4 1=5 2=3"),
    "no end of line": ("0=20 1=2\n", "0=20 1=2"),
    "two spaces": ("Swish s", "Swish  s"),
    "a letter beyond ASCII": ("Swish s", "Swish \u0455"),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good graph of four layers."""
    (tmp_path / "model.ncnn.param").write_text(PARAM)
    (tmp_path / "model.ncnn.bin").write_bytes(WEIGHTS)
    (tmp_path / "model.ports.json").write_text(json.dumps(PORTS))
    return tmp_path / "model.ncnn.param"


def refuse(path: Path) -> str:
    """What the engine says of the file, before its library has seen it."""
    with pytest.raises(EngineError, match=re.escape(str(path))) as refusal:
        read_checked(path)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_good_graph_is_read_and_runs(path: Path) -> None:
    graph = read_ncnn_graph(path)
    assert graph.shapes == {"x": (3, 4, 5), "c": (2, 4, 5), "s": (2, 4, 5), "y": (2, 20)}
    assert [result.macs for result in graph.results] == [0, 54 * 20, 0, 0]
    pytest.importorskip("ncnn", reason="ncnn is not installed")
    session = load_engine("ncnn").open_session(path, EngineOptions(threads=1))
    assert session.run({"x": np.ones((2, 3, 4, 5), np.float32)})["y"].shape == (2, 2, 20)


def test_what_is_written_is_what_is_read() -> None:
    layers = [
        Layer("Input", "x", (), ("x",), {0: 8}),
        Layer("BinaryOp", "b", ("x",), ("b",), {0: 2, 1: 1, 2: -1.25e-7}),
        Layer("Slice", "s", ("b",), ("p", "q"), {0: (3, 5), 1: 0}),
    ]
    assert parse_param(format_param(layers)) == layers
    exact = float(np.float32(1 / 3))
    (read,) = parse_param(format_param([Layer("Input", "x", (), ("x",), {2: exact})]))
    assert np.float32(read.params[2]) == np.float32(exact)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_param_is_refused(path: Path, case: str) -> None:
    old, new = BROKEN[case]
    assert old in PARAM
    path.write_text(PARAM.replace(old, new, 1), encoding="utf-8")
    assert "is not a readable ncnn graph" in refuse(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "end within those of 'c'|begins with"),
        (WEIGHTS[:-1], "end within those of 'c'"),
        (WEIGHTS + b"\0", r"81 bytes, its layers read 80"),
        (bytes(4) + WEIGHTS[4:], "begins with 0x0, which is not int8"),
        (b"\x01\x02\x03\x04" + WEIGHTS[4:], "begins with 0x4030201"),
    ],
    ids=["empty", "cut", "longer", "float32 where int8 is said", "unknown tag"],
)
def test_broken_weights_are_refused(path: Path, data: bytes, words: str) -> None:
    name_bin(path).write_bytes(data)
    assert re.search(words, refuse(path))


@pytest.mark.parametrize(
    ("group", "name", "port", "words"),
    [
        ("inputs", "x", {"dtype": "float32", "shape": [2, 3, 4, 6]}, r"x has rows of \(3, 4, 5\)"),
        ("inputs", "z", {"dtype": "float32", "shape": [2, 3, 4, 5]}, r"its inputs are \['x'\]"),
        ("inputs", "x", {"dtype": "object", "shape": [2, 3, 4, 5]}, "got object"),
        ("outputs", "y", {"dtype": "int64", "shape": [2, 2, 20]}, "no float32"),
        ("outputs", "y", {"dtype": "float32", "shape": [3, 2, 20]}, "x has 2 rows where the first output has 3"),
        ("outputs", "y", {"dtype": "float32", "shape": []}, "with a batch|rows"),
    ],
)
def test_ports_that_do_not_fit_are_refused(path: Path, group: str, name: str, port: dict, words: str) -> None:
    changed = PORTS | {group: {name: port}}
    path.with_name("model.ports.json").write_text(json.dumps(changed))
    assert re.search(words, refuse(path))


def test_missing_files_are_refused(path: Path) -> None:
    name_bin(path).unlink()
    assert "No such file" in refuse(path)


def test_another_name_is_refused(path: Path) -> None:
    other = path.with_name("model.param")
    path.rename(other)
    assert "does not end with .ncnn.param" in refuse(other)


RUN = """
import sys
from pathlib import Path
import numpy as np
from qdeploy.base.errors import EngineError
from qdeploy.engines.base import EngineOptions, load_engine
engine, counts = load_engine("ncnn"), {"refused": 0, "ran": 0}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    print(folder.name, flush=True)
    path = folder / "model.ncnn.param"
    try:
        session = engine.open_session(path, EngineOptions(threads=1))
        ports = session._ports.inputs
        session.run({name: np.ones(port.shape, port.dtype) for name, port in ports.items()})
        counts["ran"] += 1
    except EngineError as exc:
        assert "\\n" not in str(exc)
        counts["refused"] += 1
print(counts)
"""
CASES = 240


@pytest.mark.exports
def test_mutated_files_never_end_the_process(int8_ncnn: Path, tmp_path: Path) -> None:
    """Cut, flipped and mixed bytes, and other numbers, in each of the three files; the hashes are not looked at."""
    pytest.importorskip("ncnn", reason="ncnn is not installed")
    for seed in range(CASES):
        folder = tmp_path / "cases" / f"{seed:03}"
        shutil.copytree(int8_ncnn / "text_encoder", folder)
        mutate_one(folder, random.Random(seed))
    command = [sys.executable, "-c", RUN, str(tmp_path / "cases")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1].replace("'", '"'))
    assert counts["refused"] + counts["ran"] == CASES
    assert counts["refused"] > CASES / 2  # flipped weights run


def mutate_one(folder: Path, rng: random.Random) -> None:
    """Change one file: bytes of any, or one number of the ``.param``."""
    name = rng.choice(("model.ncnn.param", "model.ncnn.param", "model.ncnn.bin", "model.ports.json"))
    path = folder / name
    if name == "model.ncnn.param" and rng.random() < 0.7:
        text = path.read_text()
        numbers = list(re.finditer(r"(?<=[= ,])-?[0-9]+(?=[ \n,])", text))
        chosen = rng.choice(numbers)
        value = rng.choice(("0", "-1", "1", "2", "3", "64", "65536", "2147483647", str(int(chosen[0]) * 2)))
        path.write_text(text[: chosen.start()] + value + text[chosen.end() :])
        return
    path.write_bytes(mutate_bytes(path.read_bytes(), rng)[0])
