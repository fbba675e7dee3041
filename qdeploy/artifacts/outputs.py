"""What each output of ours is recognised by, so that a command replaces it and nothing else."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

from qdeploy.artifacts.bundle import MANIFEST
from qdeploy.base.encode import PNG_MARK
from qdeploy.base.files import read_state
from qdeploy.base.outputs import OutputKind

HEAD_BYTES = 4096  # where a mark is, if the file has one
MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit
MAX_PICKLE_BYTES = 2**20
MAX_DOCUMENT_BYTES = 64 * 2**20  # figures and features of many pictures
QDIFFUSION_MARK = "made_by"  # key in a .pt file; Q-Diffusion reads only the keys that it knows
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # written by file managers into every folder that is looked at
PAGE_MARK = b'<meta name="generator" content="qdeploy">'
BENCH_MARK = b'"schema": "qdeploy bench"'
DEMO_REPORT_MARK = b"# FP32 and W8A8\n"


def has_mark(path: Path, mark: bytes) -> bool:
    """Whether ``mark`` is in the first bytes of the file."""
    with path.open("rb") as file:
        return mark in file.read(HEAD_BYTES)


def has_metadata(path: Path, key: str) -> bool:
    """Whether the file is a safetensors file with ``key`` in its metadata; only its header is read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, path.stat().st_size):
                return False
            return key in json.loads(file.read(length))["__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def is_own_qdiffusion(path: Path) -> bool:
    """Whether the file is a set in Q-Diffusion's layout that we wrote; nothing in it is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                return QDIFFUSION_MARK.encode() in file.read(MAX_PICKLE_BYTES)
    except (OSError, zipfile.BadZipFile, StopIteration, RuntimeError, NotImplementedError):
        return False


def is_own_bundle(path: Path) -> bool:
    """Whether the folder holds a manifest of ours and nothing that it does not list."""
    document = read_state(path / MANIFEST, MAX_DOCUMENT_BYTES)
    try:
        if not {"schema_version", "components", "latents"} <= document.keys():
            return False
        listed = {str(entry["path"]) for entry in document["files"]} | {MANIFEST}
    except (KeyError, TypeError):
        return False
    return all(name in listed for name in list_names(path))


def list_names(folder: Path) -> list[str]:
    """Paths of all files in the folder, links to folders too, without what file managers write."""
    names = []
    for parent, inner, files in os.walk(folder):
        links = [name for name in inner if Path(parent, name).is_symlink()]
        names += [Path(parent, name).relative_to(folder).as_posix() for name in (*files, *links) if name not in LITTER]
    return names


def is_own_evaluation(path: Path) -> bool:
    """Whether the file is a result of `evaluate`."""
    return {"settings", "environment", "contenders", "schema_version"} <= read_state(path, MAX_DOCUMENT_BYTES).keys()


def is_own_receipt(path: Path) -> bool:
    """Whether the file is a receipt or another state of ours."""
    document = read_state(path, MAX_DOCUMENT_BYTES)
    return "key" in document or set(document) == {"scale"}


CALIBRATION = OutputKind(
    "a calibration set", lambda path: has_metadata(path, "qdeploy_calibration"), "its header does not say so"
)
QDIFFUSION = OutputKind("a calibration set in Q-Diffusion's layout", is_own_qdiffusion, "it does not say so")
TABLE = OutputKind("a table", lambda path: has_metadata(path, "qdeploy_table"), "its header does not say so")
BUNDLE = OutputKind("a bundle", is_own_bundle, f"it has no {MANIFEST} that lists all its files", is_folder=True)
PICTURE = OutputKind("a picture", lambda path: has_mark(path, PNG_MARK), "it is no PNG whose software is qdeploy")
PAGE = OutputKind("a page", lambda path: has_mark(path, PAGE_MARK), "it is no HTML whose generator is qdeploy")
BENCH_RUN = OutputKind("a measurement", lambda path: has_mark(path, BENCH_MARK), "it does not begin as one")
DEMO_REPORT = OutputKind("a report of the demo", lambda path: has_mark(path, DEMO_REPORT_MARK), "it begins otherwise")
EVALUATION = OutputKind("a result of evaluate", is_own_evaluation, "it is no such JSON")
EVALUATION_TABLE = OutputKind(
    "a table of evaluate", lambda path: is_own_evaluation(path.with_name("result.json")), "no result.json is with it"
)
FEATURES = OutputKind(
    "features of pictures",
    lambda path: "positions" in read_state(path.with_suffix(".json"), MAX_DOCUMENT_BYTES),
    "no .json is there",
)
RECEIPT = OutputKind("a receipt", is_own_receipt, "it is no such JSON")
