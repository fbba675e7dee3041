"""A bundle's folder: names that stay in it, and that it holds what the manifest lists and nothing else."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

from msgspec import Meta

from qdeploy.artifacts.graph_format import GraphFile, GraphFormat
from qdeploy.base.errors import BundleError, join_names
from qdeploy.base.files import hash_file

MAX_FILES = 4096
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # written by file managers into every folder that is looked at
APPLE_DOUBLE = "._"  # begins the name of a file of Mac attributes, on disks that have no place for those
REMEDY = "copy or export the bundle again"


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle, as the manifest lists it."""

    path: Annotated[str, Meta(min_length=1, max_length=512)]
    bytes: Annotated[int, Meta(ge=0, le=2**53)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


def check_names(manifest: Path, names: Iterable[str]) -> None:
    """BundleError for a name that leaves the folder, or that another system takes for the name of another file."""
    seen: dict[str, str] = {}
    for name in names:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
            raise BundleError(f"{manifest} names {name!r}, which lies outside the bundle; the bundle is refused")
        if not name.isprintable() or PurePosixPath(name).as_posix() != name or not parts:
            raise BundleError(f"{manifest} names {name!r}, expected a plain relative path; the bundle is refused")
        earlier = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if earlier is not name:
            raise BundleError(
                f"{manifest} names {earlier!r} and {name!r}, which are one file on some systems; the bundle is refused"
            )


def is_litter(name: str) -> bool:
    """Whether a file manager writes files of this name into folders; nothing of a bundle is read from them."""
    return name in LITTER or name.startswith(APPLE_DOUBLE)


def check_listed(folder: Path, manifest_name: str, listed: Iterable[str]) -> None:
    """BundleError for links, for files that the manifest does not list, and for those that are not there."""
    present, expected = set(_list_files(folder)) - {manifest_name}, set(listed)
    if missing := sorted(expected - present):
        raise BundleError(f"{folder} is incomplete: {join_names(missing)} is missing; {REMEDY}")
    extra = sorted(name for name in present - expected if not is_litter(PurePosixPath(name).name))
    if extra:
        raise BundleError(
            f"{folder} holds {join_names([ascii(name) for name in extra])}, which {manifest_name} does not list; "
            "remove what is not the bundle's, or export it again"
        )


def check_content(folder: Path, entry: FileEntry, verify: bool) -> None:
    """BundleError unless the file has its size and, with ``verify``, its hash."""
    path = folder / entry.path
    actual_bytes = path.stat().st_size
    if actual_bytes != entry.bytes:
        raise BundleError(f"{path} is {actual_bytes} bytes, the manifest says {entry.bytes}; {REMEDY}")
    if verify and hash_file(path) != entry.sha256:
        raise BundleError(f"{path} was changed: its SHA-256 is not the manifest's; {REMEDY}")


def read_graph(folder: Path, name: str, graph_format: GraphFormat, listed: Mapping[str, FileEntry]) -> GraphFile:
    """The graph in the file ``name``; BundleError for no graph, or one that reads what is not listed."""
    try:
        graph = graph_format.read(folder / name, graph_format.max_bytes)
    except (OSError, ValueError) as exc:
        raise BundleError(f"{folder / name} is not a readable {graph_format.title} ({exc}); {REMEDY}") from exc
    for location in graph.external_files - {""}:
        # relative to the graph's own folder; a listed name never leads out of the bundle
        if (PurePosixPath(name).parent / location).as_posix() not in listed:
            raise BundleError(
                f"{folder / name} reads weights from {location!r}, which the manifest does not list; the bundle is "
                "refused"
            )
    return graph


def _list_files(folder: Path) -> list[str]:
    """Paths of all files below ``folder``; BundleError for links, devices and the like, whose content is elsewhere."""
    files: list[str] = []
    pending = [("", folder)]
    while pending:
        prefix, inner = pending.pop()
        with os.scandir(inner) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append((name + "/", Path(entry.path)))
                elif entry.is_file(follow_symlinks=False):
                    files.append(name)
                else:
                    raise BundleError(
                        f"{folder} holds {name!r}, which is a link or no regular file and may lead outside the bundle; "
                        "copy the bundle with the files themselves (`cp -rL`)"
                    )
                if len(files) + len(pending) > MAX_FILES:
                    raise BundleError(f"{folder} holds more than {MAX_FILES} files, which no bundle does; {REMEDY}")
    return files
