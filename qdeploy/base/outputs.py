"""The check of every `-o`, made before any work: the place, its room, and whose is what is there already.

What is there is replaced only where it is recognised as an earlier output of the same kind; everything else is the
user's and is refused.
"""

from __future__ import annotations

import os
import tempfile
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from qdeploy.base.disk import find_existing_folder, format_bytes, measure_free_bytes
from qdeploy.base.errors import DiskFullError, UsageError
from qdeploy.base.files import read_state
from qdeploy.base.staging import Leftover, remove_leftovers

LEAST_BYTES = 2**20  # no output of ours is so small that less room is enough for certain
NAME_MARGIN = 32  # characters that a scratch folder's name has more than the output's
MAX_NAME_BYTES = 255  # where the file system does not say
MANIFEST, MODEL_INDEX = "manifest.json", "model_index.json"  # of bundles, and of diffusers' pipelines
MANIFEST_FIELDS = {"schema_version", "components", "latents"}  # of a bundle; other programs have a manifest.json too


@dataclass(frozen=True)
class OutputKind:
    """What a command writes.

    name: as errors call it: "a bundle".
    is_ours: whether an existing file (or folder, where ``is_folder``) is an earlier output of this kind.
    hint: what tells it, for errors.
    """

    name: str
    is_ours: Callable[[Path], bool]
    hint: str
    is_folder: bool = False


@dataclass(frozen=True)
class Output:
    """One place that a command will write to. ``option``: how the user gave it."""

    path: Path
    kind: OutputKind
    option: str = "-o"
    needed_bytes: int = 0


def check_outputs(outputs: Iterable[Output]) -> list[Leftover]:
    """UsageError or DiskFullError where one cannot be written; else what killed runs left there, removed now."""
    places: dict[str, str] = {}
    checked = list(outputs)
    for output in checked:
        check_output(output)
        place = identify_place(output.path)
        if place in places:
            raise UsageError(f"{output.option} {output.path}: {places[place]} is the same file; give another name")
        places[place] = output.option
    return [left for output in checked for left in remove_leftovers(output.path)]


def identify_place(path: Path) -> str:
    """One text for all spellings of a place: links and `..` resolved, and names that some disks take for one."""
    place = os.path.join(os.path.realpath(path.parent), path.name)
    return unicodedata.normalize("NFC", os.path.normcase(place)).casefold()


def check_output(output: Output) -> None:
    """UsageError or DiskFullError, before any work, where this output could not be written at the end."""
    check_name(output.path, output.option)
    check_no_bundle(Path(os.path.realpath(output.path.parent)), output.path, output.option)
    check_existing(output)
    check_writable(output.path, output.option)
    check_room(output.path, output.needed_bytes, output.option)


def check_working_folder(path: Path, option: str = "-o") -> None:
    """The same of a folder that a command adds files to; what it overwrites there are outputs of their own."""
    check_name(path, option)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{option} {path} is a file, expected a folder or a new name; give another one")
    if path.is_symlink() and not path.exists():
        raise UsageError(f"{option} {path} is a link that leads nowhere; remove it or give another name")
    if (path / MANIFEST).exists() or (path / MODEL_INDEX).exists():
        raise UsageError(f"{option} {path} is a bundle or a model, which this would add files to; give another folder")
    check_no_bundle(Path(os.path.realpath(path)), path, option)
    check_writable(path / "x", option)
    check_room(path / "x", 0, option)


def check_no_bundle(folder: Path, path: Path, option: str) -> None:
    """UsageError where ``folder`` is a bundle or inside one: a file more, and the bundle would be refused."""
    for place in (folder, *folder.parents):
        if is_bundle_manifest(place / MANIFEST):
            raise UsageError(
                f"{option} {path} is inside the bundle {place}, which holds only what its manifest lists; give a place "
                "outside of it"
            )


def is_bundle_manifest(path: Path) -> bool:
    """Whether the file is there and begins to describe a bundle of ours."""
    return os.path.isfile(path) and read_state(path).keys() >= MANIFEST_FIELDS


def check_name(path: Path, option: str) -> None:
    """UsageError unless ``path`` ends in a name that a file can have."""
    if path.name in ("", ".", ".."):
        raise UsageError(f"{option}: got {str(path)!r}, expected the name of what is written; give one, such as ./out")
    parent = find_existing_folder(path)
    try:
        limit = os.pathconf(parent, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        limit = MAX_NAME_BYTES
    *missing, name = (len(os.fsencode(part)) for part in path.absolute().relative_to(parent).parts)
    if name > limit - NAME_MARGIN:
        raise UsageError(f"{option}: a name of {name} bytes is too long, expected at most {limit - NAME_MARGIN}")
    if max(missing, default=0) > limit:
        raise UsageError(f"{option}: a folder's name of {max(missing)} bytes is too long, expected at most {limit}")


def check_existing(output: Output) -> None:
    """UsageError where something is at the place that is not this command's to replace."""
    path, kind, option = output.path, output.kind, output.option
    if not os.path.lexists(path):
        return
    if not path.exists():
        raise UsageError(f"{option} {path} is a link that leads nowhere; remove it or give another name")
    if kind.is_folder:
        check_existing_folder(path, kind, option)
    elif path.is_dir():
        raise UsageError(f"{option} {path} is a folder, expected the name of a file to write; give one in it")
    elif not path.is_file():
        raise UsageError(f"{option} {path} is neither a file nor a folder, which nothing is written over; give a name")
    elif path.stat().st_size and not kind.is_ours(path):
        raise UsageError(
            f"{option} {path} is there already and is not {kind.name} of qdeploy ({kind.hint}), so it is not replaced; "
            "move it away or give another name"
        )


def check_existing_folder(path: Path, kind: OutputKind, option: str) -> None:
    """The same of a folder that is replaced whole; an empty one may be."""
    if path.is_symlink():
        raise UsageError(f"{option} {path} is a link, which would be replaced itself; give the folder's own path")
    if not path.is_dir():
        raise UsageError(f"{option} {path} is a file, expected a folder to write; give another name")
    if os.path.ismount(path):
        raise UsageError(f"{option} {path} is a mounted disk, which cannot be replaced; give a new folder in it")
    if any(path.iterdir()) and not kind.is_ours(path):
        raise UsageError(
            f"{option} {path} is a folder with other content than {kind.name} of qdeploy ({kind.hint}), which would be "
            "deleted; move it away or give another name"
        )


def check_writable(path: Path, option: str) -> None:
    """UsageError unless a file can be made in the folder of ``path``, or in the nearest one above that is there."""
    blocker = next((parent for parent in path.absolute().parents if os.path.lexists(parent)), Path("/"))
    if not blocker.is_dir():
        raise UsageError(f"{option} {path}: {blocker} is a file and no folder; give another place")
    try:
        with tempfile.TemporaryFile(dir=blocker):
            pass
    except OSError as exc:
        raise UsageError(
            f"{option} {path}: nothing can be written to {blocker} ({exc.strerror}); give another place"
        ) from exc


def check_room(path: Path, needed_bytes: int, option: str = "-o") -> None:
    """DiskFullError where fewer than ``needed_bytes`` are free, or less than the least that anything takes."""
    needed, free = max(needed_bytes, LEAST_BYTES), measure_free_bytes(path)
    if free < needed:
        raise DiskFullError(
            f"{option} {path} needs about {format_bytes(needed)}, {format_bytes(free)} are free there; make room or "
            "give another place; nothing has been done yet"
        )
