"""Nothing half-written ever carries the final name, not even on a full disk; what killed runs left is removed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Never

import pytest
from click.testing import CliRunner

from qdeploy.base.disk import explain_full_disk, is_full_disk, note_kept
from qdeploy.base.errors import DiskFullError, UsageError
from qdeploy.base.files import read_state, stage_file, stage_folder
from qdeploy.base.staging import hold_folder, remove_leftovers, remove_leftovers_below
from qdeploy.cli import main
from qdeploy.export import exporter
from tests.forked import limit_files, run_forked


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


def test_a_failing_last_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    rename = Path.rename

    def fail_for_new(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="Input/output"), stage_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("new")
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_after_the_first_rename_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    rename = Path.rename

    def interrupt_after_old(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if Path(target).name == "old":
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", interrupt_after_old)
    with pytest.raises(KeyboardInterrupt), stage_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("new")
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_only_copy_stays_where_it_cannot_be_moved_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    rename = Path.rename

    def fail_but_for_old(path: Path, target: Path) -> Path:
        if Path(target).name != "old":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_but_for_old)
    with pytest.raises(OSError, match="Input/output"), stage_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("new")
    monkeypatch.undo()
    (leftover,) = remove_leftovers(tmp_path / "out")
    assert leftover.restored == tmp_path / "out"
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_a_file_appears_only_when_complete(tmp_path: Path) -> Never:
    with pytest.raises(RuntimeError), stage_file(tmp_path / "f") as scratch:
        scratch.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with stage_file(tmp_path / "f") as scratch:
        scratch.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


# ------------------------------------------------------------------------------------------------------- killed runs

HOLD = """
import sys, time
from pathlib import Path
from qdeploy.base.files import stage_file, stage_folder
with stage_folder(Path(sys.argv[1])) as folder, stage_file(Path(sys.argv[2])) as file:
    (folder / "weights").write_bytes(bytes(5000))
    file.write_bytes(bytes(3000))
    print("staged", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holding(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is writing the folder ``out`` and the file ``out.png``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out"), str(tmp_path / "out.png")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "staged\n"
    yield process
    process.kill()
    process.wait()


def test_leftovers_of_the_dead_are_removed_and_never_those_of_the_living(
    holding: subprocess.Popen[str], tmp_path: Path
) -> None:
    (tmp_path / ".out.part").mkdir()  # a recording that goes on: its name is another
    (tmp_path / ".out.abcdefgh.part").mkdir()
    (tmp_path / "out.txt").write_text("a letter")
    (tmp_path / ".other.scratch-abcdefgh.part").mkdir()  # of another output
    before = sorted(path.name for path in tmp_path.iterdir())
    assert len(before) == 6
    assert remove_leftovers(tmp_path / "out") == remove_leftovers(tmp_path / "out.png") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    holding.kill()
    holding.wait()
    (folder,) = remove_leftovers(tmp_path / "out")
    (file,) = remove_leftovers(tmp_path / "out.png")
    assert (folder.size_bytes, file.size_bytes) == (5000, 3000)
    assert str(folder) == f"removed {folder.path} (5.0 kB), left by a run that was killed"
    left = {".out.part", ".out.abcdefgh.part", "out.txt", ".other.scratch-abcdefgh.part"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_leftovers_anywhere_below_a_folder(holding: subprocess.Popen[str], tmp_path: Path) -> None:
    (tmp_path.parent / "above").mkdir(exist_ok=True)
    above = tmp_path.rename(tmp_path.parent / "above" / tmp_path.name).parent
    assert remove_leftovers_below(above) == []
    holding.kill()
    holding.wait()
    assert len(remove_leftovers_below(above)) == 2
    (above / tmp_path.name).rename(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_between_the_last_two_renames_gives_the_old_folder_back(tmp_path: Path) -> None:
    scratch = tmp_path / ".out.scratch-abcdefgh.part"
    (scratch / "old").mkdir(parents=True)
    (scratch / "old" / "manifest.json").write_text("old")
    (scratch / "new").mkdir()
    (left,) = remove_leftovers(tmp_path / "out")
    assert left.restored == tmp_path / "out"
    assert "is there again" in str(left)
    assert (tmp_path / "out" / "manifest.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_killed_while_it_removed_the_replaced_folder_gives_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then the new folder was in its place; if the user has moved that away, half of an old one must not appear."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed here
    with stage_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("new")
    monkeypatch.undo()
    (tmp_path / "out").rename(tmp_path / "moved away")
    (left,) = remove_leftovers(tmp_path / "out")
    assert left.restored is None
    assert [path.name for path in tmp_path.iterdir()] == ["moved away"]


HOLD_FOLDER = """
import sys, time
from pathlib import Path
from qdeploy.base.staging import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_do_not_share_finished_parts(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    first = subprocess.Popen([sys.executable, "-c", HOLD_FOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match="another run is at work in "), hold_folder(folder):
        pass
    first.kill()
    first.communicate()
    with hold_folder(folder):
        pass


def test_finished_parts_stay_and_scratch_among_them_goes(tmp_path: Path) -> None:
    """What a killed AdaRound leaves: finished blocks, and up to --cache-gb of their inputs."""
    work = tmp_path / ".q.safetensors.part"
    scratch = work / ".scratch.scratch-abcdefgh.part"
    scratch.mkdir(parents=True)
    (scratch / "input-0").write_bytes(bytes(4000))
    (work / "0123").mkdir()
    (work / "0123" / "batch-000000.safetensors").write_bytes(b"x")
    (left,) = remove_leftovers(tmp_path / "q.safetensors")
    assert (left.path, left.size_bytes) == (scratch, 4000)
    assert [path.name for path in tmp_path.rglob("*")] == [".q.safetensors.part", "0123", "batch-000000.safetensors"]


def test_a_link_that_looks_like_a_leftover_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "letter").write_text("x")
    os.symlink(tmp_path / "real", tmp_path / ".out.scratch-abcdefgh.part")
    assert remove_leftovers(tmp_path / "out") == remove_leftovers_below(tmp_path) == []
    assert (tmp_path / "real" / "letter").read_text() == "x"


def kill_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """End this process where an export comes to the UNet."""
    export_component = exporter.export_component

    def export_or_die(model: object, name: str, *arguments: object, **options: object) -> object:
        if name == "unet":
            os.kill(os.getpid(), signal.SIGKILL)
        return export_component(model, name, *arguments, **options)

    monkeypatch.setattr(exporter, "export_component", export_or_die)


@pytest.mark.exports
def test_the_next_export_removes_what_a_killed_one_left_and_says_so(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    with monkeypatch.context() as patch:
        kill_in_the_middle(patch)
        killed = run_forked(lambda: main(["--quiet", "export", str(tiny_folder), "-o", str(out)]))
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".bundle.scratch-")
    result = CliRunner().invoke(main, ["--quiet", "export", str(tiny_folder), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert f"removed {left}" in result.stderr
    assert "left by a run that was killed" in result.stderr
    assert list(tmp_path.iterdir()) == [out]


# --------------------------------------------------------------------------------------------------------- full disks


@pytest.mark.exports
def test_a_disk_that_fills_during_export_is_one_paragraph_and_leaves_nothing(tmp_path: Path, tiny_folder: Path) -> None:
    def export() -> None:
        limit_files(100_000)
        main(["--quiet", "export", str(tiny_folder), "-o", str(tmp_path / "bundle")])

    done = run_forked(export)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert f"{tmp_path / 'bundle'} cannot be written, the disk is full" in done.stderr
    assert "B are free there" in done.stderr
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


def raise_as(library: str, folder: Path) -> None:
    """What each library that writes for us raises under a file size limit, or where the device is full."""
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.numpy import save_file

    full = Path("/dev/full")
    if library == "python":
        full.write_bytes(b"x")
    elif library == "pillow":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(full, format="PNG")
    elif library == "numpy":
        with full.open("wb") as file:
            np.zeros(10**6).tofile(file)
    elif library == "torch":
        torch.save({"x": torch.zeros(10**6)}, full)
    elif library == "safetensors":
        save_file({"x": np.zeros(10**6)}, folder / "x.safetensors")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full, a device without room")
@pytest.mark.parametrize("library", ["python", "pillow", "numpy", "torch", "safetensors"])
def test_every_library_that_writes_for_us_says_it_in_one_way(library: str, tmp_path: Path) -> None:
    def write() -> None:
        limit_files(1000)
        try:
            with stage_file(tmp_path / "out", 12_345_678) as scratch:
                raise_as(library, scratch.parent)
        except Exception as exc:
            print(type(exc).__name__, exc)

    done = run_forked(write)
    assert done.stdout.startswith(f"DiskFullError {tmp_path / 'out'} cannot be written"), done.stdout + done.stderr
    assert "it needs about 12.3 MB, " in done.stdout
    assert "are free there; make room there or give another place" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    for error in (PermissionError(errno.EACCES, "denied"), ValueError("os error 5"), RuntimeError("boom")):
        assert not is_full_disk(error)
        with pytest.raises(type(error)), explain_full_disk(tmp_path / "x"):
            raise error


def test_what_is_kept_goes_with_interruption_and_full_disk(tmp_path: Path) -> None:
    def run(error: BaseException) -> None:
        with note_kept(lambda: "3 parts are kept"), explain_full_disk(tmp_path / "x"):
            raise error

    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "full"), DiskFullError)):
        with pytest.raises(raised) as info:
            run(error)
        assert info.value.__notes__ == ["3 parts are kept"]
    with pytest.raises(ValueError, match="boom") as info:
        run(ValueError("boom"))
    assert not hasattr(info.value, "__notes__")


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    with stage_file(tmp_path / "f") as first, stage_file(tmp_path / "f") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
        time.sleep(0)
    assert (tmp_path / "f").read_text() == "1"  # of the one that ended last
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
