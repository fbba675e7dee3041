"""What every engine promises, checked on each one that is installed here; a new engine passes this file unedited."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdeploy.artifacts.graph_format import load_format
from qdeploy.base.errors import EngineError, EngineUnavailableError
from qdeploy.engines.base import Engine, EngineOptions, Kernel, Session, list_engines
from qdeploy.targets.base import ONNX_FILES, GraphFiles, Target, list_targets, load_target
from tests.installed import load_or_skip

WEIGHT = np.random.default_rng(0).standard_normal((8, 4), np.float32)
CODES = np.full((64, 16), 127, np.int8)  # the largest, so that an accumulator of 16 bits saturates
RTOL = 1e-5  # float32 sums of 8 and 64 products, in whatever order

Feeds = dict[str, NDArray]


@pytest.fixture(params=list_engines())
def engine(request: pytest.FixtureRequest) -> Engine:
    return load_or_skip(request.param)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``noise_pred = sample @ WEIGHT + timestep`` and ``doubled = 2 noise_pred``; timestep is a scalar int64."""
    nodes = [
        helper.make_node("MatMul", ["sample", "weight"], ["product"]),
        helper.make_node("Cast", ["timestep"], ["t"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["product", "t"], ["noise_pred"]),
        helper.make_node("Add", ["noise_pred", "noise_pred"], ["doubled"]),
    ]
    inputs = [tensor("sample", TensorProto.FLOAT, [2, 8]), tensor("timestep", TensorProto.INT64, [])]
    outputs = [tensor(name, TensorProto.FLOAT, [2, 4]) for name in ("noise_pred", "doubled")]
    return save_model(nodes, inputs, outputs, {"weight": WEIGHT}, tmp_path_factory.mktemp("engines") / "float.onnx")


@pytest.fixture
def file(engine: Engine, graph: Path, tmp_path: Path) -> Path:
    """``graph`` as the file that the engine opens."""
    return convert_graph(engine, graph, tmp_path)


@pytest.fixture
def session(engine: Engine, file: Path) -> Session:
    return engine.open_session(file, EngineOptions())


def convert_graph(engine: Engine, graph: Path, folder: Path) -> Path:
    """An ONNX graph as the engine's own target writes it, if that is another format."""
    files = find_files(engine)
    if files.format == ONNX_FILES.format:
        return graph
    path = folder / f"{graph.stem}{load_format(files.format).suffix}"
    files.write(ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(graph))), path)
    return path


def find_target(engine: Engine) -> Target | None:
    """The target whose bundles ``engine`` runs; None for one that runs other targets' ONNX graphs."""
    name = engine.__name__.rpartition(".")[2].replace("_", "-")  # type: ignore[attr-defined]
    return next((target for target in map(load_target, list_targets()) if target.engine == name), None)


def find_files(engine: Engine) -> GraphFiles:
    """How graphs are written for ``engine``."""
    target = find_target(engine)
    return ONNX_FILES if target is None else target.files


def tensor(name: str, kind: int, shape: list[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def save_model(nodes: list, inputs: list, outputs: list, constants: dict[str, NDArray], path: Path) -> Path:
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def feeds(seed: int = 0, t: int = 3) -> Feeds:
    sample = np.random.default_rng(seed).standard_normal((2, 8), np.float32)
    return {"sample": sample, "timestep": np.array(t, np.int64)}


def test_it_names_its_versions(engine: Engine) -> None:
    assert all(name and version for name, version in engine.versions().items())


def test_outputs_come_by_name(session: Session) -> None:
    given = feeds(t=7)
    actual = session.run(given)
    expected = given["sample"] @ WEIGHT + 7
    assert set(actual) == {"noise_pred", "doubled"}
    assert actual["noise_pred"].dtype == np.float32
    np.testing.assert_allclose(actual["noise_pred"], expected, rtol=RTOL)
    np.testing.assert_allclose(actual["doubled"], 2 * expected, rtol=RTOL)


def test_an_output_outlives_the_next_run(session: Session) -> None:
    first = session.run(feeds(t=1))["noise_pred"]
    kept = first.copy()
    session.run(feeds(t=500))
    assert np.array_equal(first, kept)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sample": np.zeros((2, 9), np.float32)},
        {"sample": np.zeros((3, 8), np.float32)},
        {"sample": np.zeros((2, 8), np.float64)},
        {"timestep": np.array(3, np.int32)},
        {"stranger": np.zeros(1, np.float32)},
    ],
    ids=["width", "batch", "float64", "int32", "unknown name"],
)
def test_a_wrong_feed_is_refused(session: Session, wrong: Feeds) -> None:
    with pytest.raises(EngineError):
        session.run(feeds() | wrong)


def test_a_missing_feed_is_refused(session: Session) -> None:
    session.run(feeds())
    with pytest.raises(EngineError):
        session.run({"sample": feeds()["sample"]})


def test_it_runs_on_after_a_refused_feed(session: Session) -> None:
    with pytest.raises(EngineError):
        session.run({})
    assert session.run(feeds())["noise_pred"].shape == (2, 4)


def test_a_closed_session_is_refused(session: Session) -> None:
    session.close()
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.run(feeds())


def test_the_number_of_threads_changes_no_result(engine: Engine, file: Path) -> None:
    one, two = (engine.open_session(file, EngineOptions(threads=count)).run(feeds()) for count in (1, 2))
    np.testing.assert_allclose(one["noise_pred"], two["noise_pred"], rtol=RTOL)


def test_concurrent_runs_equal_serial_runs(session: Session) -> None:
    given = [feeds(seed, t=seed) for seed in range(200)]
    serial = [session.run(one)["noise_pred"] for one in given]
    with ThreadPoolExecutor(8) as pool:
        concurrent = list(pool.map(lambda one: session.run(one)["noise_pred"], given))
    for expected, actual in zip(serial, concurrent, strict=True):
        assert np.array_equal(expected, actual)


@pytest.mark.parametrize("content", [b"", b"not a graph"], ids=["empty", "text"])
def test_what_is_no_graph_is_refused(engine: Engine, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / f"broken{load_format(find_files(engine).format).suffix}"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=re.escape(path.name)):
        engine.open_session(path, EngineOptions())


def test_a_missing_file_is_refused(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / f"nowhere{load_format(find_files(engine).format).suffix}"
    with pytest.raises(EngineError, match=re.escape(path.name)):
        engine.open_session(path, EngineOptions())


@pytest.fixture
def integer_graph(tmp_path: Path) -> Path:
    """u8 activation and s8 weight: 64 products of 255 x 127 need more than 16 bits."""
    return save_integer_graph(np.uint8(255), tmp_path / "int8.onnx")


@pytest.fixture
def integer_file(engine: Engine, tmp_path: Path) -> Path:
    """The same for the engine, with s8 activations where its own files know no others."""
    target = find_target(engine)
    only_signed = target is not None and target.files is not ONNX_FILES and target.numerics.signed_activations
    highest = np.int8(127) if only_signed else np.uint8(255)
    return convert_graph(engine, save_integer_graph(highest, tmp_path / "int8.onnx"), tmp_path)


def save_integer_graph(highest: np.uint8 | np.int8, path: Path) -> Path:
    """``y = x @ codes`` in integers; ``highest`` is the code of x = 1."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_codes"]),
        helper.make_node("DequantizeLinear", ["x_codes", "x_scale", "x_zero"], ["x_real"]),
        helper.make_node("DequantizeLinear", ["codes", "w_scale"], ["weight"], axis=1),
        helper.make_node("MatMul", ["x_real", "weight"], ["y"], name="product"),
    ]
    constants = {
        "x_scale": np.float32(1 / highest),
        "x_zero": type(highest)(0),
        "codes": CODES,
        "w_scale": np.full(16, 0.01, np.float32),
    }
    inputs, outputs = [tensor("x", TensorProto.FLOAT, [1, 4, 64])], [tensor("y", TensorProto.FLOAT, [1, 4, 16])]
    return save_model(nodes, inputs, outputs, constants, path)


def test_the_largest_integer_codes_do_not_saturate(engine: Engine, integer_file: Path) -> None:
    actual = engine.open_session(integer_file, EngineOptions()).run({"x": np.ones((1, 4, 64), np.float32)})["y"]
    np.testing.assert_allclose(actual, np.full((1, 4, 16), 64 * 1.27, np.float32), rtol=RTOL)


def list_kernels(engine: Engine, path: Path, given: Feeds | None = None) -> list[Kernel]:
    """The engine's kernels; to look inside, an engine may need a package that is not here."""
    try:
        return engine.kernels(path, EngineOptions(), given)
    except EngineUnavailableError as exc:
        pytest.skip(str(exc))


def test_it_names_its_kernels(engine: Engine, integer_file: Path, file: Path) -> None:
    integer = [kernel for kernel in list_kernels(engine, integer_file) if kernel.integer]
    assert len(integer) == 1
    assert integer[0].seconds is None
    known = {"product", "y"} & set(integer[0].names)  # by its own name or its output's
    assert known or any(name.startswith("codes") for name in integer[0].constants)
    assert not any(kernel.integer for kernel in list_kernels(engine, file))


def test_it_times_its_kernels(engine: Engine, file: Path) -> None:
    kernels = list_kernels(engine, file, feeds())
    assert any(kernel.seconds is not None for kernel in kernels)


# What a session made by hand, such as one on a stand-in for a GPU, is held to as well
PROMISES = (
    test_outputs_come_by_name,
    test_an_output_outlives_the_next_run,
    test_a_missing_feed_is_refused,
    test_it_runs_on_after_a_refused_feed,
    test_a_closed_session_is_refused,
    test_concurrent_runs_equal_serial_runs,
)
