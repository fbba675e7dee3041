"""A model repository for Triton: config.pbtxt by Triton's own schema, model.py against a stand-in of its module."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from google.protobuf import json_format, text_format

import qdeploy
from qdeploy.cli import main


class Tensor:
    """As Triton's Python backend has it."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceRequest:
    def __init__(self, *, is_cancelled: bool = False, **inputs: np.ndarray) -> None:
        self.tensors, self._is_cancelled = [Tensor(name, array) for name, array in inputs.items()], is_cancelled

    def inputs(self) -> list[Tensor]:
        return self.tensors

    def is_cancelled(self) -> bool:
        return self._is_cancelled


class TritonError:
    def __init__(self, message: str) -> None:
        self._message = message

    def message(self) -> str:
        return self._message


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.tensors, self._error = output_tensors, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def read(self, name: str) -> np.ndarray:
        return next(tensor.as_numpy() for tensor in self.tensors if tensor.name() == name)


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def write(out: Path, *arguments: object) -> None:
    result = CliRunner().invoke(
        main, ["--quiet", "triton", *map(str, arguments), "-o", str(out)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output


def read_config(folder: Path) -> Any:
    """By the schema that Triton's client brings; a name or a type that is not Triton's raises."""
    path = metadata.distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(path))
    assert spec is not None
    assert spec.loader is not None
    schema = sys.modules.get("model_config_pb2") or importlib.util.module_from_spec(spec)
    if "model_config_pb2" not in sys.modules:
        sys.modules["model_config_pb2"] = schema
        spec.loader.exec_module(schema)
    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())


@contextmanager
def open_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The model of ``model.py``, initialized as Triton does."""
    utils = types.ModuleType("triton_python_backend_utils")
    for value in (Tensor, InferenceRequest, InferenceResponse, TritonError, get_input_tensor_by_name):
        setattr(utils, value.__name__, value)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    config = json_format.MessageToJson(read_config(folder), preserving_proto_field_name=True)
    model.initialize({"model_config": config, "model_repository": str(folder), "model_version": "1"})
    yield model
    model.finalize()


def texts(*values: str) -> np.ndarray:
    return np.array([[value.encode()] for value in values], np.object_)


def numbers(*values: float, dtype: type = np.int32) -> np.ndarray:
    return np.array([[value] for value in values], dtype)


def test_the_config_is_tritons(float_bundle: Path, open_bundle: Path, tmp_path: Path) -> None:
    write(tmp_path / "out", f"tiny={float_bundle}", f"open={open_bundle}", "--instances", 3, "--batch", 8, "--queue", 5)
    config = read_config(tmp_path / "out" / "tiny")
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "python", 8)
    assert {tensor.name: tensor.optional for tensor in config.input} == {
        "PROMPT": False, "NEGATIVE_PROMPT": True, "SEED": True, "STEPS": True, "GUIDANCE_SCALE": True,
    }  # fmt: skip
    assert {tensor.name: list(tensor.dims) for tensor in config.output} == {"IMAGES": [16, 16, 3], "SEEDS": [1]}
    assert config.instance_group[0].count == 3
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 5
    opened = read_config(tmp_path / "out" / "open")
    assert {"WIDTH", "HEIGHT"} <= {tensor.name for tensor in opened.input}
    assert list(opened.output[0].dims) == [-1, -1, 3]


def test_pictures_are_the_runtimes(float_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", f"tiny={float_bundle}", "--threads", 1, "--steps", 2)
    with open_model(tmp_path / "out" / "tiny", monkeypatch) as model, qdeploy.load(float_bundle, threads=1) as pipe:
        first, second, third = model.execute(
            [
                InferenceRequest(PROMPT=texts("a cat", "a dog"), SEED=numbers(3, 4, dtype=np.int64)),
                InferenceRequest(
                    PROMPT=texts("a house"), SEED=numbers(5, dtype=np.int64), STEPS=numbers(3),
                    GUIDANCE_SCALE=numbers(1.0, dtype=np.float32), NEGATIVE_PROMPT=texts("blue"),
                ),
                InferenceRequest(PROMPT=texts("a cat")),
            ]
        )  # fmt: skip
        expected = [pipe(text, seed=seed, steps=2).pixels[0] for text, seed in (("a cat", 3), ("a dog", 4))]
        assert np.array_equal(first.read("IMAGES"), np.stack(expected))
        assert first.read("SEEDS").tolist() == [[3], [4]]
        unguided = pipe("a house", negative_prompt="blue", seed=5, steps=3, guidance_scale=1.0)
        assert np.array_equal(second.read("IMAGES"), unguided.pixels)
        (drawn,) = third.read("SEEDS")[0]
        assert np.array_equal(third.read("IMAGES"), pipe("a cat", seed=int(drawn), steps=2).pixels)


def test_batched_requests_share_calls(float_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", f"tiny={float_bundle}", "--threads", 1, "--guidance", 1, "--steps", 1)
    with open_model(tmp_path / "out" / "tiny", monkeypatch) as model:
        calls: list[int] = []
        call = type(model._pipe).__call__
        monkeypatch.setattr(
            type(model._pipe), "__call__", lambda self, **more: calls.append(len(more["seed"])) or call(self, **more)
        )
        responses = model.execute([InferenceRequest(PROMPT=texts(f"{n}")) for n in range(5)])
    assert not any(response.has_error() for response in responses)
    assert calls == [2, 2, 1]


def test_an_error_is_its_requests(float_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", f"tiny={float_bundle}", "--threads", 1, "--steps", 1)
    with open_model(tmp_path / "out" / "tiny", monkeypatch) as model:
        responses = model.execute(
            [
                InferenceRequest(PROMPT=texts("x" * 10_001)),
                InferenceRequest(PROMPT=np.array([[b"\xff"]], np.object_)),
                InferenceRequest(PROMPT=texts("a cat"), STEPS=numbers(1, 2)),
                InferenceRequest(PROMPT=texts("a cat"), is_cancelled=True),
                InferenceRequest(PROMPT=texts("a cat")),
            ]
        )
        told = [response.error().message() if response.has_error() else "" for response in responses]
    for message, words in zip(told, ("too long", "no UTF-8", "one length for all", "cancelled", ""), strict=True):
        assert words in message
        assert bool(message) is bool(words)
        assert str(tmp_path) not in message


def test_only_an_own_repository_is_replaced(float_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, f"old={float_bundle}")
    (out / "old" / "1" / "__pycache__").mkdir()
    (out / "old" / "1" / "__pycache__" / "model.pyc").write_bytes(b"")
    write(out, f"new={float_bundle}")
    assert [path.name for path in out.iterdir()] == ["new"]
    (out / "letter.txt").write_text("Dear all")
    arguments = ["triton", str(float_bundle), "-o", str(out)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 2
    assert "a folder with other content than a model repository of qdeploy" in result.output
    assert (out / "letter.txt").read_text() == "Dear all"
