"""Ctrl-C ends every command with 130 and one line that says what is kept; the same command, run again, goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.base.progress import OnProgress
from qdeploy.cli import main
from qdeploy.evaluate.result import read_result

INTERRUPTED = 130


def stop_after(monkeypatch: pytest.MonkeyPatch, calls: int, task: str = "") -> None:
    """Every command's progress raises what Ctrl-C raises, at this call of it for tasks that begin so."""

    @contextmanager
    def show_progress(_: bool = True) -> Iterator[OnProgress]:
        count = 0

        def on_progress(name: str, done: int, total: int, note: str = "") -> None:
            nonlocal count
            count += name.startswith(task)
            if count == calls:
                raise KeyboardInterrupt

        yield on_progress

    monkeypatch.setattr("qdeploy.base.progress.show_progress", show_progress)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["--quiet", *map(str, arguments)], catch_exceptions=False)


def check_interrupted(result: Result, kept: str) -> None:
    assert result.exit_code == INTERRUPTED, result.output
    assert result.stderr.splitlines()[-1] == f"qdeploy: interrupted; {kept}"
    assert "Aborted" not in result.output


def test_calibrate_keeps_batches_and_goes_on(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c.safetensors"
    command = ("calibrate", tiny_folder, "-o", out, "--samples", 4, "--steps", 2, "--batch", 2)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        check_interrupted(
            run(*command),
            f"1 finished parts are kept in {tmp_path / '.c.safetensors.part'}: the same command goes on from there",
        )
    assert not out.exists()
    assert run(*command).exit_code == 0
    other = tmp_path / "other.safetensors"
    assert run(*command[:3], other, *command[4:]).exit_code == 0
    assert out.read_bytes() == other.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.safetensors", "other.safetensors"]


def test_quantize(tiny_folder: Path, calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("quantize", tiny_folder, "--calib", calibration_file, "-o", tmp_path / "q.safetensors")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        check_interrupted(run(*command), "nothing is kept: the same command starts anew")
    assert list(tmp_path.iterdir()) == []
    again = run(*command)
    assert again.exit_code == 0, again.output
    assert [path.name for path in tmp_path.iterdir()] == ["q.safetensors"]


def test_export(tiny_folder: Path, float_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    out = tmp_path / "bundle"
    shutil.copytree(float_bundle, out)
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        stop_after(patch, 2)  # the first component is made
        check_interrupted(run("export", tiny_folder, "-o", out), f"nothing is kept: {out} is as it was")
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [out]
    again = run("export", tiny_folder, "-o", out)
    assert again.exit_code == 0, again.output
    assert open_bundle(out).manifest.components.keys() == {"text_encoder", "unet", "vae_decoder"}
    assert list(tmp_path.iterdir()) == [out]


def test_generate(float_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 4)
    monkeypatch.setattr("qdeploy.sample.numbered.MAX_BATCH", 1)
    result = run("generate", float_bundle, "a cat", "-o", tmp_path / "cat.png", "--count", 3, "--steps", 2)
    check_interrupted(result, "1 of 3 pictures are written")
    assert [path.name for path in tmp_path.iterdir()] == ["cat-0.png"]


def test_evaluate(float_bundle: Path, int8_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    out = tmp_path / "figures"
    command = (
        "evaluate", float_bundle, int8_bundle, "--metrics", "psnr,fid", "--reference", float_bundle, "--extractor",
        "rgb8", "--count", 4, "--steps", 2, "--batch", 1, "--prompts", tmp_path / "prompts.txt", "-o", out,
    )  # fmt: skip
    kept = f"pictures and features made so far are kept in {out}: the same command goes on from there"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)  # the second picture's first call of the UNet; PNDM makes three for two steps
        check_interrupted(run(*command), kept)
    first = out / "pictures" / float_bundle.name / "000000.png"
    assert list(out.rglob("*.png")) == [first]
    made = first.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        stop_after(patch, 1, "features")  # rows are in the file, and its state is not written yet
        check_interrupted(run(*command), kept)
    assert list(out.glob("features/*.npy"))
    assert not (out / "result.json").exists()
    again = run(*command)
    assert again.exit_code == 0, again.output
    assert first.stat().st_mtime_ns == made
    assert {name for entry in read_result(out / "result.json").contenders for name in entry.figures} >= {"psnr", "fid"}


@pytest.mark.exports
def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    command = ("run", "recipes/lsun_churches_w8a8.toml", "-o", out, "--scale", "tiny")
    kept = f"finished steps and pictures are kept in {out}: the same command goes on from there"
    for task in ("", "export"):
        with monkeypatch.context() as patch:
            stop_after(patch, 1, task)
            check_interrupted(run(*command), kept)
    recorded = (out / "calibration.safetensors").stat().st_mtime_ns
    assert not (out / "bundle").exists()
    again = run(*command)
    assert again.exit_code == 0, again.output
    assert (out / "calibration.safetensors").stat().st_mtime_ns == recorded
    assert open_bundle(out / "bundle")
    assert list((out / "pictures").glob("*.png"))


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 1)
    result = run("demo", "-o", tmp_path / "demo", "--samples", 1, "--steps", 2)
    check_interrupted(result, f"finished files are kept in {tmp_path / 'demo'}: the same command makes them anew")


def test_a_command_without_anything_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qdeploy.inspection.describe.describe", interrupt)
    check_interrupted(run("inspect", "builtin:emoji"), "nothing was written")


def test_a_real_interrupt(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    command = ["calibrate", str(tiny_folder), "-o", str(out), "--samples", "3000", "--batch", "1", "--steps", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "qdeploy.cli", "--quiet", *command], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in a shell's background
    )  # fmt: skip
    work = tmp_path / ".c.safetensors.part"
    deadline = time.monotonic() + 120
    while len(list(work.glob("batch-*"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, errors
    assert errors.splitlines()[-1].startswith("qdeploy: interrupted; ")
    assert f"finished parts are kept in {work}" in errors
    assert "Traceback" not in errors
    assert len(list(work.glob("batch-*"))) >= 2
    assert not list(work.glob("*.part"))
