"""Artifacts are built once for all workers, anew when their sources change, and no test can change them unnoticed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests import shared_artifacts as artifacts
from tests.shared_artifacts import BUILDS, KEPT, Artifacts, Build, hash_sources, remove_stale

Register = Callable[..., None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Makes functions artifacts of their names, for one test."""

    def add(*writes: Callable[..., object]) -> None:
        for write in writes:
            monkeypatch.setitem(BUILDS, write.__name__, Build(write, "out", traces=False))

    return add


def test_workers_share_what_one_of_them_builds(register: Register, tmp_path: Path) -> None:
    built: list[str] = []

    def base(out: Path) -> None:
        built.append("base")
        out.write_text("1")

    def top(out: Path, base: Path) -> None:
        built.append("top")
        out.mkdir()
        (out / "file").write_text(base.read_text() + "2")

    register(base, top)
    with ThreadPoolExecutor(4) as pool:  # a store each, as workers have; the locks are the files' own
        paths = list(pool.map(lambda _: Artifacts(tmp_path, "key").path("top"), range(8)))
    assert sorted(built) == ["base", "top"]
    assert {(path / "file").read_text() for path in paths} == {"12"}
    assert len(set(paths)) == 1


def test_a_worker_that_waits_builds_something_else(register: Register, tmp_path: Path) -> None:
    begun, other_built, builders = threading.Event(), threading.Event(), list[str]()

    def long(out: Path) -> None:
        begun.set()
        assert other_built.wait(30)  # which the waiting worker does, or this fails
        out.touch()

    def broken(out: Path) -> None:
        raise RuntimeError("broken")

    def other(out: Path) -> None:
        builders.append(threading.current_thread().name)
        out.touch()
        other_built.set()

    register(long, broken, other)
    with ThreadPoolExecutor(1, "first") as pool:
        first = pool.submit(Artifacts(tmp_path, "key").path, "long")
        assert begun.wait(30)
        waiting = Artifacts(tmp_path, "key", ["long", "broken", "other"])
        assert waiting.path("long") == first.result(30)
    assert builders == [threading.current_thread().name]
    with pytest.raises(RuntimeError, match="broken"):  # where it is asked for
        waiting.path("broken")


def test_a_build_that_failed_leaves_nothing_and_is_tried_again(register: Register, tmp_path: Path) -> None:
    tries: list[bool] = []

    def flaky(out: Path) -> None:
        tries.append(not out.parent.joinpath("part").exists())
        (out.parent / "part").touch()
        if len(tries) == 1:
            raise RuntimeError("first")
        out.touch()

    register(flaky)
    store = Artifacts(tmp_path, "key")
    with pytest.raises(RuntimeError, match="first"):
        store.path("flaky")
    assert store.path("flaky").exists()
    assert tries == [True, True]


@pytest.mark.parametrize("change", ["write", "add", "remove"])
def test_a_changed_artifact_is_named_and_built_anew(register: Register, tmp_path: Path, change: str) -> None:
    def pair(out: Path) -> None:
        out.mkdir()
        for name in "ab":
            (out / name).write_text(name)

    register(pair)
    store = Artifacts(tmp_path, "key")
    path = store.path("pair")
    store.check_unchanged()
    if change == "remove":
        (path / "a").unlink()
    else:
        (path / ("a" if change == "write" else "c")).write_text("changed")
    with pytest.raises(AssertionError, match="tests changed the artifacts pair"):
        store.check_unchanged()
    again = Artifacts(tmp_path, "key").path("pair")
    assert {file.name: file.read_text() for file in again.iterdir()} == {"a": "a", "b": "b"}


def test_another_key_is_another_artifact_and_old_ones_go(register: Register, tmp_path: Path) -> None:
    def one(out: Path) -> None:
        out.touch()

    register(one)
    paths = [Artifacts(tmp_path, f"key {number}").path("one") for number in range(KEPT + 2)]
    Artifacts(tmp_path, "key 0").path("one")  # used last
    remove_stale(tmp_path)
    assert [path.exists() for path in paths] == [True, *[False] * 2, *[True] * (KEPT - 1)]
    assert len(list(tmp_path.iterdir())) == 2 * KEPT  # a lock for each


def test_any_source_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in artifacts.SHARED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(artifacts.ROOT / name, tmp_path / name)
    source = tmp_path / "qdeploy" / "part" / "module.py"
    source.parent.mkdir(parents=True)
    source.write_text("a = 1\n")
    monkeypatch.setattr(artifacts, "ROOT", tmp_path)
    first = hash_sources()
    (source.parent / "__pycache__").mkdir()
    (source.parent / "__pycache__" / "module.pyc").write_bytes(b"compiled")
    assert hash_sources() == first
    source.write_text("a = 2\n")
    second = hash_sources()
    with (tmp_path / artifacts.SHARED[0]).open("a") as file:
        file.write("\n")
    assert len({first, second, hash_sources()}) == 3


def test_a_trace_without_the_mark_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"without_the_mark_fails traces a graph: add @pytest\.mark"):
        torch.onnx.export(torch.nn.Identity(), (torch.ones(1),), dynamo=True)


def test_two_artifacts_of_one_name_are_refused(register: Register) -> None:
    def one(out: Path) -> None: ...

    register(one)
    with pytest.raises(AssertionError, match="two artifacts are called one"):
        artifacts.build_once("out", traces=False)(one)
