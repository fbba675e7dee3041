"""Every page's commands and snippets run, in order, on the tiny model and with small settings.

Exports take their bundle from the shared ones (tests/commands/test_cli.py and tests/export make real ones); where
no shared bundle is of the same kind, the command is checked and nothing is made.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from qdeploy.artifacts.table import load_table
from qdeploy.calibrate.spec import EFFORTS
from qdeploy.cli import main
from qdeploy.targets.base import load_target
from tests.docs.blocks import PAGES, ROOT, Block, Command, blocks_in, commands_in
from tests.docs.given import FOLDERS, list_makers
from tests.docs.test_blocks_fit import parse, translate_options

FROM_SCRATCH = {"README.md", "first-bundle.md"}  # pages that make everything themselves
SMALL = {
    "calibrate": ["--samples", "2", "--steps", "3"],
    "generate": ["--steps", "2"],
    "bench": ["--rounds", "1", "--pictures", "0", "--steps", "1", "--fresh-starts", "0", "--concurrency", "none"],
    "evaluate": ["--count", "2", "--steps", "1"],
}  # the last value counts, so these go after what the page says
SHARED = {
    ("ort-cpu", "fp32", False, False): "float_bundle",
    ("ort-cpu", "fp32", True, False): "encoder_bundle",
    ("ort-cpu", "int8", False, False): "int8_bundle",
    ("ort-cpu", "int8", True, True): "open_bundle",
    ("tensorrt", "int8", False, False): "int8_tensorrt",
    ("ncnn", "int8", False, False): "int8_ncnn",
    ("litert", "int8", False, False): "int8_litert",
}  # target, precision, with encoder, open dimensions -> fixture
ONLY_NAMED = ("make", "pip")  # what a page may ask for and a test must not do
MADE: dict[str, Path] = {}  # outputs of this process by what made them: several pages begin alike


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a page runs in, with every effort a short one."""
    monkeypatch.chdir(tmp_path)
    for name, effort in EFFORTS.items():
        monkeypatch.setitem(EFFORTS, name, replace(effort, iterations=2, samples=2, batch=2))
    return tmp_path


def needs_bundle(page: Path) -> bool:
    return any(block.runs and re.search(r"\bbundle|\bexport ", block.text) for block in blocks_in(page))


RUNNING = [page for page in PAGES if any(block.runs for block in blocks_in(page))]


@pytest.mark.parametrize("page", [page for page in RUNNING if not needs_bundle(page)], ids=lambda page: page.stem)
def test_a_page_runs(page: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    run_page(page, folder, request)


@pytest.mark.usefixtures(*sorted({*SHARED.values(), *FOLDERS.values()}))
@pytest.mark.parametrize("page", [page for page in RUNNING if needs_bundle(page)], ids=lambda page: page.stem)
def test_a_page_runs_on_bundles(page: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    """The fixtures are named here, so that a run without exports can leave these pages out."""
    run_page(page, folder, request)


def run_page(page: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    """Run all of a page's blocks in one folder and, for Python, one namespace."""
    namespace: dict[str, object] = {}
    for block in blocks_in(page):
        if not block.runs:
            continue
        if page.name not in FROM_SCRATCH:
            give(block, folder, request)
        if block.language == "python":
            exec(compile(block.text, block.where, "exec"), namespace)
        else:
            for command in commands_in(block):
                run(command, folder, request)


def give(block: Block, folder: Path, request: pytest.FixtureRequest) -> None:
    """Put what the block names, and earlier ones have not made, into the folder."""
    for name, make in list_makers(request).items():
        if re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w-])", block.text) and not (folder / name).exists():
            make(folder / name)


def run(command: Command, folder: Path, request: pytest.FixtureRequest) -> None:
    """One command of a page, which must succeed."""
    if command.argv[0] == "printf":
        subprocess.run(["bash", "-c", command.text], cwd=folder, check=True)
    elif command.argv[0] == "qdeploy":
        argv = [in_place(word, request) for word in translate_options(command.argv[1:])]
        name, options = parse(argv)
        if name == "export":
            export(options, request)
        else:
            keep_or_run(argv, command, Path(str(options["out"])) if name in ("calibrate", "quantize") else None)
    else:
        assert command.argv[0] in ONLY_NAMED, f"{command.block.where}: {command.text}"


def in_place(word: str, request: pytest.FixtureRequest) -> str:
    """Built-in models are the tiny ones here, and the repository's files are where they are."""
    if word.startswith("builtin:"):
        return str(request.getfixturevalue("unconditional_folder" if word.endswith("uncond") else "tiny_folder"))
    return str(ROOT / word) if word.startswith("recipes/") else word


def keep_or_run(argv: list[str], command: Command, out: Path | None) -> None:
    """Run the command, unless the very same one has made ``out`` before."""
    takes_own_sizes = {"--from-qdiffusion", "--forecast", "--speed"} & set(argv)  # so few steps are none to forecast
    small = [] if takes_own_sizes else SMALL.get(argv[0], [])
    key = " ".join(digest(word) for word in [*argv, *small] if out is None or word != str(out))
    if out is not None and key in MADE and MADE[key].suffix == out.suffix:
        shutil.copy(MADE[key], out)
        return
    result = CliRunner().invoke(main, ["--quiet", *argv, *small])
    assert result.exit_code == 0, f"{command.block.where}: {command.text}\n{result.output}"
    if out is not None:
        MADE[key] = out.absolute()


def digest(word: str) -> str:
    """``word``, or the hash of the file that it names."""
    path = Path(word)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else word


def export(options: dict[str, object], request: pytest.FixtureRequest) -> None:
    """The shared bundle of the same kind, where there is one, in the place of what the command would make."""
    source, target = Path(str(options["source"])), load_target(str(options["target"]))
    assert source.exists(), f"{source}: the page exports what it has not made"
    if source.is_file():
        load_table(source)
    precision = target.choose_precision(source.is_file())
    target.check_precision(str(options["precision"] or precision))
    fixture = SHARED.get((target.name, precision, bool(options["with_encoder"]), options["dynamic"] is not None))
    if fixture is not None:
        shutil.copytree(request.getfixturevalue(fixture), str(options["out"]), dirs_exist_ok=True)
