"""Nothing half-written ever carries the final name, not even on a full disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Never

import pytest

from qdeploy.base.files import read_state, stage_file, stage_folder


def test_a_folder_appears_only_when_complete(tmp_path: Path) -> Never:
    with pytest.raises(RuntimeError), stage_folder(tmp_path / "out") as scratch:
        (scratch / "half").write_text("x")
        assert not (tmp_path / "out").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rewrite_leaves_the_old_folder(tmp_path: Path) -> Never:
    with stage_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), stage_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "a").read_text() == "old"
    with stage_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("new")
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_appears_only_when_complete(tmp_path: Path) -> Never:
    with pytest.raises(RuntimeError), stage_file(tmp_path / "f") as scratch:
        scratch.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, signal, sys
from qdeploy.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)                  # make the write fail instead of the process
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as a disk with no room for a larger file does
main(["--quiet", "export", sys.argv[1], "-o", sys.argv[2]])
"""


@pytest.mark.exports
def test_a_disk_that_fills_during_export_is_one_paragraph_and_leaves_nothing(tmp_path: Path, tiny_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tiny_folder), str(tmp_path / "bundle")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "MB are free there" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{", b"\xff", b"[" * 10**6, b'{"a": NaN}', b'{"a": 1e999}'])
def test_an_unreadable_state_is_empty(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    assert read_state(path) == {}
    path.write_text('{"key": "k"}')
    assert read_state(path) == {"key": "k"}


def test_a_state_that_is_no_file_is_empty(tmp_path: Path) -> None:
    assert read_state(tmp_path) == {}
    os.mkfifo(tmp_path / "pipe")
    assert read_state(tmp_path / "pipe") == {}  # and does not wait for a writer
