"""A disk that fills while a command works: one paragraph with the file, what is free and what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdeploy.cli import main
from tests.forked import limit_files, run_forked

GOES_ON = "the same command goes on from there"


def run_limited(limit: int, *arguments: object) -> str:
    """Standard error of the command where no file can be larger than ``limit`` bytes."""

    def run() -> None:
        limit_files(limit)
        main(["--quiet", *map(str, arguments)])

    done = run_forked(run)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def check_named(errors: str, path: Path, kept: str, needed: str = "it needs about ") -> None:
    assert f"{path} cannot be written, the disk is full or allows no larger file: {needed}" in errors
    assert "B are free there; make room there" in errors
    assert errors.endswith(kept)


def test_calibrate(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    command = ("calibrate", tiny_folder, "-o", out, "--steps", 4, "--batch", 1)
    # a batch fits and the whole set does not
    check_named(run_limited(8_000, *command, "--samples", 6), out, GOES_ON)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.safetensors.part"]
    other = tmp_path / "set.pt"
    check_named(run_limited(8_000, *command[:3], other, *command[4:], "--samples", 6), other, GOES_ON)


def test_quantize(tiny_folder: Path, calibration_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.safetensors"
    errors = run_limited(50_000, "quantize", tiny_folder, "--calib", calibration_file, "-o", out, "--no-gptq")
    check_named(errors, out, "nothing is kept: the same command starts anew")
    assert list(tmp_path.iterdir()) == []


def test_quantize_with_adaround(tiny_folder: Path, calibration_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.safetensors"
    errors = run_limited(
        10_000, "quantize", tiny_folder, "--calib", calibration_file, "-o", out, "--adaround", "--effort", "fast"
    )
    assert "cannot be written, the disk is full or allows no larger file: " in errors
    assert str(tmp_path / ".q.safetensors.part") in errors
    assert errors.endswith("nothing is kept: the same command starts anew")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_adaround(tmp_path: Path) -> None:
    import torch

    from qdeploy.base.errors import DiskFullError
    from qdeploy.calibrate.rounding.cache import RowCache

    cache = RowCache(tmp_path / "input-0")
    cache._file.close()
    cache._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 - the cache closes it
    with pytest.raises(DiskFullError, match=r"input-0 cannot be written.*make room there, lower --cache-gb or give"):
        cache.append(torch.zeros(4, 8))
    cache.remove()
    assert list(tmp_path.iterdir()) == []


def test_generate(float_bundle: Path, tmp_path: Path) -> None:
    command = ("generate", float_bundle, "a cat", "-o", tmp_path / "cat.png", "--count", 2, "--steps", 1)
    check_named(run_limited(200, *command), tmp_path / "cat-0.png", "0 of 2 pictures are written")
    assert list(tmp_path.iterdir()) == []


def test_evaluate(float_bundle: Path, int8_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    out = tmp_path / "figures"
    command = ("evaluate", float_bundle, int8_bundle, "--prompts", tmp_path / "prompts.txt", "-o", out, "--steps", 1)
    sizes = ("--count", 2, "--metrics", "psnr")
    errors = run_limited(600, *command, *sizes)
    assert f"{out}/pictures/" in errors
    check_named(errors, next(word for word in map(Path, errors.split()) if word.suffix == ".png"), GOES_ON)
    features = ("--count", 40, "--metrics", "fid", "--reference", float_bundle, "--extractor", "rgb8")
    errors = run_limited(1_500, *command, *features)
    assert f"{out}/features/" in errors
    assert errors.endswith(GOES_ON)


def test_room_is_looked_at_before_the_work(
    tiny_folder: Path, calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with 2 MB free is enough for some outputs and not for others, by what each needs."""
    from click.testing import CliRunner

    monkeypatch.setattr("qdeploy.base.outputs.measure_free_bytes", lambda _: 2 * 2**20)
    for name, arguments in {
        "calibrate": (tiny_folder, "-o", tmp_path / "c", "--samples", 100_000),
        "export": (tiny_folder, "-o", tmp_path / "bundle"),
    }.items():
        result = CliRunner().invoke(main, ["--quiet", name, *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 1, result.output
        assert "2.1 MB are free there; make room or give another place; nothing has been done yet" in result.output
    assert list(tmp_path.iterdir()) == []
