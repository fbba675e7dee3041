"""Checkpoint files that are hostile, cut, of another format or full of a trainer's objects: nothing ever runs."""

from __future__ import annotations

import argparse
import collections
import copy
import os
import pickle
import sys
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qdeploy.base.errors import ModelError
from qdeploy.models.checkpoints import read_checkpoint

WEIGHTS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.bias": torch.ones(5, dtype=torch.float16)}


class Calls:
    """Unpickled the ordinary way, calls ``function`` with ``arguments``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


def payloads(marker: Path) -> dict[str, tuple[Any, str]]:
    """What to store, and the global that must be named."""
    touch = f"open({str(marker)!r}, 'w').close()"
    return {
        "system": (Calls(os.system, f"touch {marker}"), r"(posix|nt)\.system"),
        "eval": (Calls(eval, touch), r"builtins\.eval"),
        "exec": (Calls(exec, touch), r"builtins\.exec"),
        "getattr": (Calls(getattr, Calls(__import__, "os"), "system"), r"builtins\.(getattr|__import__)"),
        "nested": ([{"deep": (1, [Calls(exec, touch)])}], r"builtins\.exec"),
        "path": (Calls(Path.touch, marker), "pathlib|getattr"),
        "in_an_inert_thing": (argparse.Namespace(x=Calls(exec, touch)), r"builtins\.exec"),
        "torch_load": (Calls(torch.load, str(marker)), r"torch\.serialization\.load"),
        "torch_code": (Calls(torch.jit.load, str(marker)), r"torch\.jit\.\w+\.load"),
        "numpy_load": (Calls(np.load, str(marker)), r"numpy.*load"),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", payloads(Path()))
def test_a_hostile_pickle_is_refused_by_name(tmp_path: Path, name: str, protocol: int, zipped: bool) -> None:
    marker, path = tmp_path / "ran", tmp_path / "model.ckpt"
    payload, words = payloads(marker)[name]
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save({"state_dict": WEIGHTS, "callbacks": payload}, path, **options)
    with pytest.raises(ModelError, match=rf"model\.ckpt .*({words}).*safetensors"):
        read_checkpoint(path)
    torch.save({"state_dict": {**WEIGHTS, "c": payload}}, path, **options)
    with pytest.raises(ModelError, match=words):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(payload, protocol=protocol))
    with pytest.raises(ModelError, match=r"model\.ckpt"):
        read_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'touch %s'\ntR.",  # protocol 0
        b"(S'touch %s'\nios\nsystem\n.",  # INST calls without REDUCE
        b"\x80\x02cposix\nsystem\nX\x07\x00\x00\x00touch x\x85R.",
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x94h\x00h\x01\x93\x8c\x07touch x\x85R.",  # named through the memo
        b"\x80\x02cpytorch_lightning.os\nsystem\nU\x07touch x\x85R.",  # an inert name is not looked up
    ],
)
def test_handmade_instructions(tmp_path: Path, code: bytes) -> None:
    marker, path = tmp_path / "ran", tmp_path / "model.ckpt"
    code = code.replace(b"%s", str(marker).encode())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", code)
        archive.writestr("model/version", "3\n")
        archive.writestr("model/byteorder", "little")
    with pytest.raises(ModelError, match=r"model\.ckpt"):
        read_checkpoint(path)
    path.write_bytes(code)
    with pytest.raises(ModelError, match=r"model\.ckpt"):
        read_checkpoint(path)
    assert not marker.exists()


def stub(monkeypatch: pytest.MonkeyPatch, dotted: str, base: type = object) -> type:
    """A class that pickles as ``dotted``, of a library that is not installed."""
    module_name, _, name = dotted.rpartition(".")
    made = type(name, (base,), {"__module__": module_name})
    parts = module_name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    setattr(sys.modules[module_name], name, made)
    return made


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_objects_that_trainers_store_with_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    with monkeypatch.context() as patched:
        callback = stub(patched, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
        settings = stub(patched, "omegaconf.dictconfig.DictConfig")()
        settings.__dict__.update(_content={"lr": 1e-4}, _flags=None)
        attributes = stub(patched, "pytorch_lightning.utilities.parsing.AttributeDict", dict)(rate=0.1)
        content = {
            "state_dict": collections.OrderedDict(WEIGHTS),
            "callbacks": {callback: {"best_model_score": np.float64(0.25), "best": torch.tensor(1.0)}},
            "hyper_parameters": {"config": settings, "more": attributes, "args": argparse.Namespace(x=[1])},
            "loops": collections.defaultdict(dict, {"a": {"b": {1, 2}}}),
            "array": np.arange(3),
            "types": [dict, int],
        }
        torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    assert "pytorch_lightning" not in sys.modules
    before = set(torch.serialization.get_safe_globals())
    tensors = read_checkpoint(tmp_path / "model.ckpt")
    assert set(torch.serialization.get_safe_globals()) == before
    assert tensors.keys() == WEIGHTS.keys()
    assert all(torch.equal(tensors[name], WEIGHTS[name]) for name in WEIGHTS)
    assert "pytorch_lightning" not in sys.modules


def write(folder: Path, suffix: str) -> Path:
    path = folder / f"model.{suffix}"
    if suffix == "safetensors":
        save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path)
    return path


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.97, 0.999])
@pytest.mark.parametrize("suffix", ["ckpt", "pt", "safetensors"])
def test_a_cut_file(tmp_path: Path, suffix: str, share: float) -> None:
    path = write(tmp_path, suffix)
    assert read_checkpoint(path).keys() == WEIGHTS.keys()
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=rf"model\.{suffix}"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>Please log in</html>", "not a checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a checkpoint"),
        (bytes(1000), "not a checkpoint"),
        (b"PK\x03\x04" + bytes(1000), "not a checkpoint"),
    ],
)
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_another_format(tmp_path: Path, content: bytes, words: str, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a checkpoint" if suffix == "safetensors" else words):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["x.ckpt", "x.pth", "x.bin", "x.SAFETENSORS", "x"])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_file_is_read_by_its_content(tmp_path: Path, suffix: str, name: str) -> None:
    assert read_checkpoint(write(tmp_path, suffix).rename(tmp_path / name)).keys() == WEIGHTS.keys()


def test_an_archive_under_the_name_of_safetensors(tmp_path: Path) -> None:
    """torch.load chooses by that suffix."""
    with pytest.raises(ModelError, match=r"x\.safetensors is not .* but a torch\.save file; rename it to \.ckpt"):
        read_checkpoint(write(tmp_path, "ckpt").rename(tmp_path / "x.safetensors"))


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "device.ckpt").symlink_to("/dev/zero")
    for name in ("absent.ckpt", "folder.ckpt", "device.ckpt"):
        with pytest.raises(ModelError, match="not a file"):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (b"\x80\x02" + b"]0" * 2_000_000 + b".", "more than 2,000,000 instructions"),
        (b"\x80\x02" + b"X\x40\x42\x0f\x00" + b"a" * 1_000_000 + b"0" * 3_000_000, "instructions"),
        (b"c" + b"a" * (65 * 2**20), "longer than 64 MiB|at most 64 MiB"),
    ],
    ids=["opcodes", "strings", "line"],
)
def test_pickles_of_nothing_but_instructions_end_at_once(tmp_path: Path, code: bytes, words: str, zipped: bool) -> None:
    path = tmp_path / "model.ckpt"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/data.pkl", code)
    else:
        path.write_bytes(code)
    start = time.monotonic()
    with pytest.raises(ModelError, match=rf"model\.ckpt .*({words})"):
        read_checkpoint(path)
    assert time.monotonic() - start < 30


def test_complex_weights_are_named(tmp_path: Path) -> None:
    torch.save(WEIGHTS | {"c": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "c.ckpt")
    with pytest.raises(ModelError, match=r"c\.ckpt: `c` holds complex numbers"):
        read_checkpoint(tmp_path / "c.ckpt")


def test_a_header_beyond_reason(tmp_path: Path) -> None:
    header = b"{" + b" " * (17 * 2**20) + b"}"
    (tmp_path / "h.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match=r"a header of 17,825,794 bytes"):
        read_checkpoint(tmp_path / "h.safetensors")


def test_archives_that_grow(tmp_path: Path) -> None:
    path = write(tmp_path, "ckpt")
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "z.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(ModelError, match="compressed"):
        read_checkpoint(tmp_path / "z.ckpt")
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(100):
            duplicate = copy.copy(archive.getinfo("model/data.pkl"))
            duplicate.filename = f"model/data/{100 + i}"
            archive.filelist.append(duplicate)
        archive.comment = b"written again"
    with pytest.raises(ModelError, match="overlap"):
        read_checkpoint(path)


def test_a_small_file_that_describes_huge_weights(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**10)}, tmp_path / "wide.ckpt")
    with pytest.raises(ModelError, match="far more than it holds"):
        read_checkpoint(tmp_path / "wide.ckpt")


def test_no_tensors(tmp_path: Path) -> None:
    for content in ({"epoch": 3}, [torch.zeros(2)], {"state_dict": {}}, {"a": torch.zeros(2).to_sparse()}, 5):
        torch.save(content, tmp_path / "none.ckpt")
        with pytest.raises(ModelError, match=r"none\.ckpt holds no tensors"):
            read_checkpoint(tmp_path / "none.ckpt")
