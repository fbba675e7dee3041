"""Places that a command may write to: what is inside a bundle, what is one file, which names are too long."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qdeploy.base.errors import UsageError
from qdeploy.base.outputs import Output, OutputKind, check_output, check_outputs, check_working_folder

FILE = OutputKind("a file", lambda _: False, "never")
FOLDER = OutputKind("a folder", lambda _: False, "never", is_folder=True)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The beginning of one: what it is known by."""
    (tmp_path / "bundle" / "unet").mkdir(parents=True)
    document = {"schema_version": 1, "components": {}, "latents": {}, "files": []}
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(document))
    return tmp_path / "bundle"


@pytest.mark.parametrize("place", ["out.png", "unet/out.png", "new/folder/out.png"])
def test_nothing_is_written_into_a_bundle(place: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle.parent / "link").symlink_to(bundle)
    monkeypatch.chdir(bundle)
    for path in (bundle / place, Path(place), bundle.parent / "link" / place):
        for kind in (FILE, FOLDER):
            with pytest.raises(UsageError, match=rf"is inside the bundle {bundle}, which holds only what its manifest"):
                check_output(Output(path, kind))
        with pytest.raises(UsageError, match="is inside the bundle"):
            check_working_folder(path)
    assert sorted(path.name for path in bundle.rglob("*")) == ["manifest.json", "unet"]


def test_other_programs_manifests_are_no_bundles(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web site", "icons": []}')
    check_output(Output(tmp_path / "out.png", FILE))
    (tmp_path / "manifest.json").write_text('{"name": ')
    check_output(Output(tmp_path / "out.png", FILE))


@pytest.mark.parametrize("other", ["a/../x", "./x", "link/x", "X", "é"])
def test_spellings_of_one_place(other: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    name = "e\u0301" if other == "é" else "x"
    with pytest.raises(UsageError, match="--json is the same file; give another name"):
        check_outputs([Output(tmp_path / name, FILE, "--json"), Output(tmp_path / other, FILE, "--html")])


def test_only_names_that_are_made_are_measured(tmp_path: Path) -> None:
    parent = tmp_path / ("猫" * 80)  # 240 bytes, and there already
    parent.mkdir()
    check_output(Output(parent / "out", FILE))
    check_output(Output(tmp_path / ("猫" * 80 + "x") / "out", FILE))
    with pytest.raises(UsageError, match="a name of 240 bytes is too long"):
        check_output(Output(tmp_path / ("猫" * 80), FILE))
    with pytest.raises(UsageError, match="a folder's name of 300 bytes is too long"):
        check_output(Output(tmp_path / ("猫" * 100) / "out", FILE))


def test_a_refused_command_removes_nothing(tmp_path: Path) -> None:
    """A wrongly given folder, such as the home, may hold leftovers of other outputs."""
    left = tmp_path / "deep" / ".other.scratch-abcdefgh.part"
    left.mkdir(parents=True)
    (tmp_path / "x").mkdir()
    check_working_folder(tmp_path)
    with pytest.raises(UsageError):
        check_outputs([Output(tmp_path / "x", FILE)])
    assert left.is_dir()
    assert os.listdir(tmp_path / "deep") == [left.name]
