"""Every command checks where it will write before any work, and replaces only earlier outputs of its own kind."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from qdeploy.base.errors import UsageError
from qdeploy.cli import main
from qdeploy.commands import find_commands, load_command
from tests.commands.whole import FILE_COMMANDS, FOLDER_COMMANDS, OUTPUT_OPTIONS

LETTER = "Dear all, this is the only copy."
ALL = {**FILE_COMMANDS, **FOLDER_COMMANDS}


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever any of these commands begins with fails the test: the check must come first."""
    from qdeploy.models import source
    from qdeploy.serve import triton_model  # noqa: F401 - which would keep the stand-in if it were first imported here

    def fail(*_: object, **__: object) -> None:
        pytest.fail("work was begun before the output was checked")

    monkeypatch.setattr(source, "load_model", fail)
    for name in (
        "runtime.pipeline.load", "evaluate.run.run_evaluation", "demo.run_demo", "bench.measure.run_bench",
        "recipe.run.run_full", "inspection.plot.plot_sensitivity", "serve.triton_repository.write_repository",
    ):  # fmt: skip
        monkeypatch.setattr(f"qdeploy.{name}", fail)


@pytest.fixture
def bundle(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("float_bundle")


def run(name: str, out: object, bundle: Path) -> Result:
    arguments = [str(bundle) if argument == "BUNDLE" else argument for argument in ALL[name]]
    return CliRunner().invoke(main, ["--quiet", *arguments, str(out)], catch_exceptions=False)


def check_refused(result: Result, words: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_the_table_of_commands_is_complete() -> None:
    """Every option of every command that names a place to write is in the table above."""
    found = set()
    for name in find_commands():
        command = load_command(name)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option) and set(parameter.opts) & OUTPUT_OPTIONS:
                found.add(f"{name} {parameter.opts[0]}")
    assert found == set(ALL)


@pytest.mark.parametrize("place", ["", ".", "/", "..", "x/.."])
@pytest.mark.parametrize("name", ALL)
def test_a_place_without_a_name(
    name: str, place: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(run(name, place, bundle), "expected the name of what is written; give one")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ALL)
def test_a_name_that_is_too_long(name: str, bundle: Path, tmp_path: Path) -> None:
    check_refused(run(name, tmp_path / ("n" * 240 + ".png"), bundle), "is too long, expected at most")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FILE_COMMANDS)
def test_a_folder_where_a_file_is_written(name: str, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    check_refused(run(name, tmp_path / "there", bundle), "is a folder, expected the name of a file to write")
    os.symlink(tmp_path / "there", tmp_path / "link")
    check_refused(run(name, tmp_path / "link", bundle), "is a folder")


@pytest.mark.parametrize("name", FOLDER_COMMANDS)
def test_a_file_where_a_folder_is_written(name: str, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "letter").write_text(LETTER)
    check_refused(run(name, tmp_path / "letter", bundle), "is a file, expected a folder")
    assert (tmp_path / "letter").read_text() == LETTER


@pytest.mark.parametrize("name", ALL)
def test_places_that_nothing_is_written_over(name: str, bundle: Path, tmp_path: Path) -> None:
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    check_refused(run(name, tmp_path / "link", bundle), "is a link that leads nowhere")
    os.mkfifo(tmp_path / "pipe")
    check_refused(
        run(name, tmp_path / "pipe", bundle), "expected a folder" if name in FOLDER_COMMANDS else "neither a file"
    )
    check_refused(run(name, "/dev/null", bundle), "expected a folder" if name in FOLDER_COMMANDS else "neither a file")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("name", ALL)
def test_a_parent_that_is_a_file(name: str, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "letter").write_text(LETTER)
    check_refused(run(name, tmp_path / "letter" / "deep" / "out", bundle), "letter is a file and no folder")
    assert (tmp_path / "letter").read_text() == LETTER


@pytest.mark.parametrize("name", ALL)
def test_a_place_that_cannot_be_written_to(
    name: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_refused(run(name, "/proc/out", bundle), "nothing can be written to /proc")

    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.chdir(tmp_path)
    result = run(name, tmp_path / "no" / "such" / "folder", bundle)
    check_refused(result, f"nothing can be written to {tmp_path} (Permission denied)")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ALL)
def test_too_little_room(name: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdeploy.base.outputs.measure_free_bytes", lambda _: 1000)
    check_refused(run(name, tmp_path / "out", bundle), "1.0 kB are free there; make room", code=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FILE_COMMANDS)
def test_a_letter_is_not_replaced(name: str, bundle: Path, tmp_path: Path) -> None:
    letter = tmp_path / "letter"
    letter.write_text(LETTER)
    check_refused(run(name, letter, bundle), "so it is not replaced; move it away or give another name")
    assert letter.read_text() == LETTER
    assert [path.name for path in tmp_path.iterdir()] == ["letter"]


def test_a_folder_with_a_letter_is_not_replaced_by_a_bundle(bundle: Path, tmp_path: Path) -> None:
    for folder, make in {
        "mine": Path.mkdir,
        "a bundle of ours": lambda path: shutil.copytree(bundle, path),  # and a letter in it
        "another manifest": lambda path: (path.mkdir(), (path / "manifest.json").write_text("{}")),
        "a broken manifest": lambda path: (path.mkdir(), (path / "manifest.json").write_text('{"fil')),
    }.items():
        make(tmp_path / folder)
        (tmp_path / folder / "letter.txt").write_text(LETTER)
        check_refused(run("export -o", tmp_path / folder, bundle), "which would be deleted; move it away")
        assert (tmp_path / folder / "letter.txt").read_text() == LETTER
    shutil.copytree(bundle, tmp_path / "deep")
    (tmp_path / "deep" / "unet" / "letter.txt").write_text(LETTER)
    check_refused(run("export -o", tmp_path / "deep", bundle), "which would be deleted")
    os.symlink(bundle, tmp_path / "link")
    check_refused(run("export -o", tmp_path / "link", bundle), "is a link, which would be replaced itself")


def test_the_python_api_replaces_no_folder_of_the_users(tiny_model: object, tmp_path: Path) -> None:
    from qdeploy.export.exporter import export_bundle
    from qdeploy.targets.base import load_target

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text(LETTER)
    with pytest.raises(UsageError, match="would be deleted"):
        export_bundle(tiny_model, None, load_target("ort-cpu"), tmp_path / "mine")  # type: ignore[arg-type]
    assert (tmp_path / "mine" / "letter.txt").read_text() == LETTER


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *(("evaluate -o", file) for file in ("result.json", "table.md", "table.csv")),
        *(("evaluate -o", file) for file in ("calibration.csv", "features/mine.npy")),
        *(("run -o", file) for file in ("calibration.safetensors", "table.safetensors", "receipts/sample.json")),
        *(("run -o", file) for file in ("bundle/letter.txt", "receipts/scale.json")),
        *(("demo -o", file) for file in ("grid.png", "report.md", "bench.json", "w8a8.safetensors", "fp32/letter.txt")),
        *(("demo -o", file) for file in ("w8a8/letter.txt", "calibration.safetensors")),
    ],
)  # fmt: skip
def test_a_letter_where_a_folder_command_would_write(name: str, file: str, bundle: Path, tmp_path: Path) -> None:
    letter = tmp_path / "out" / file
    letter.parent.mkdir(parents=True)
    letter.write_text(LETTER)
    result = run(name, tmp_path / "out", bundle)
    check_refused(result, "move it away or give another name")
    assert letter.read_text() == LETTER


@pytest.mark.parametrize("name", ["evaluate -o", "run -o", "demo -o"])
def test_a_bundle_or_model_is_no_folder_to_add_files_to(name: str, bundle: Path, tmp_path: Path) -> None:
    check_refused(run(name, bundle, bundle), "is a bundle or a model")


def test_numbered_pictures_are_all_checked(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "cat-3.png").write_text(LETTER)
    arguments = ["--quiet", "generate", str(bundle), "a cat", "--count", "5", "-o", str(tmp_path / "cat.png")]
    check_refused(CliRunner().invoke(main, arguments, catch_exceptions=False), "cat-3.png is there already")
    assert (tmp_path / "cat-3.png").read_text() == LETTER
    check_refused(run("generate -o", tmp_path / "cat.jpg", bundle), "expected .png: pictures are written as PNG")


def test_one_file_for_two_outputs(bundle: Path, tmp_path: Path) -> None:
    arguments = ["--quiet", "bench", str(bundle), "--html", str(tmp_path / "x"), "--json", str(tmp_path / "x")]
    check_refused(CliRunner().invoke(main, arguments, catch_exceptions=False), "is the same file; give another name")


def test_an_input_is_not_replaced_by_the_output(calibration_file: Path, tmp_path: Path) -> None:
    calib = shutil.copy(calibration_file, tmp_path / "c.safetensors")
    arguments = ["--quiet", "quantize", "builtin:emoji", "--calib", str(calib), "-o", str(calib)]
    check_refused(CliRunner().invoke(main, arguments, catch_exceptions=False), "is not a table of qdeploy")
