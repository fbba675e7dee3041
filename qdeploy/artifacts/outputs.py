"""What each output of ours is recognised by, so that a command replaces it and nothing else."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from qdeploy.artifacts.bundle_files import is_litter
from qdeploy.artifacts.file_kind import CALIBRATION as CALIBRATION_KEY
from qdeploy.artifacts.file_kind import TABLE as TABLE_KEY
from qdeploy.artifacts.file_kind import read_file_kind
from qdeploy.artifacts.manifest import MANIFEST
from qdeploy.base.encode import PLOT_SOFTWARE, SOFTWARE, mark_from_software
from qdeploy.base.files import read_state
from qdeploy.base.outputs import OutputKind, is_bundle_manifest

HEAD_BYTES = 4096  # where a mark is, if the file has one
MAX_PICKLE_BYTES = 2**20
MAX_DOCUMENT_BYTES = 64 * 2**20  # figures and features of many pictures
QDIFFUSION_MARK = "made_by"  # key in a .pt file; Q-Diffusion reads only the keys that it knows
QDIFFUSION_MAKER = "qdeploy "  # begins its value
QDIFFUSION_GAP = 16  # bytes between the two in a pickle: opcodes, the value's length
PAGE_MARK = b'<meta name="generator" content="qdeploy">'
BENCH_MARK = b'"schema": "qdeploy bench"'
DEMO_REPORT_MARK = b"# FP32 and W8A8"
EVALUATION_TABLE_MARKS = (b"\n| bits | ", b"bundle,bits,calibration,n,broken", b"Calib,W32A32 IS")
TRITON_MARK = "Written by qdeploy triton"
OLDER = "or by one that did not mark its own yet"


def has_mark(path: Path, mark: bytes) -> bool:
    """Whether ``mark`` is in the first bytes of the file."""
    with path.open("rb") as file:
        return mark in file.read(HEAD_BYTES)


def is_own_qdiffusion(path: Path) -> bool:
    """Whether the file is a set in Q-Diffusion's layout that we wrote; nothing in it is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                _, _, after = file.read(MAX_PICKLE_BYTES).partition(QDIFFUSION_MARK.encode())
    except Exception:  # a broken or hostile archive fails in many ways: it is not ours
        return False
    return QDIFFUSION_MAKER.encode() in after[: QDIFFUSION_GAP + len(QDIFFUSION_MAKER)]


def is_own_bundle(path: Path) -> bool:
    """Whether the folder holds a manifest of ours and nothing that it does not list."""
    if not is_bundle_manifest(path / MANIFEST):
        return False
    try:
        listed = {str(entry["path"]) for entry in read_state(path / MANIFEST)["files"]} | {MANIFEST}
    except (KeyError, TypeError):
        return False
    return all(name in listed for name in list_names(path))


def list_names(folder: Path) -> list[str]:
    """Paths of all files in the folder, links to folders too, without what file managers write."""
    names = []
    for parent, inner, files in os.walk(folder):
        links = [name for name in inner if Path(parent, name).is_symlink()]
        names += [Path(parent, name).relative_to(folder).as_posix() for name in (*files, *links) if not is_litter(name)]
    return names


def is_own_repository(path: Path) -> bool:
    """Whether the folder is a model repository of ours, with nothing else in it."""
    models = [entry for entry in path.iterdir() if not is_litter(entry.name)]
    return bool(models) and all(map(is_own_repository_model, models))


def is_own_repository_model(path: Path) -> bool:
    """Whether the folder is one model of such a repository; Triton's Python leaves its cache in it."""
    config = path / "config.pbtxt"
    if not config.is_file() or not has_mark(config, TRITON_MARK.encode()):
        return False
    names = {name for name in list_names(path) if "__pycache__" not in name and not name.startswith("1/bundle/")}
    return names == {"config.pbtxt", "1/model.py"} and is_own_bundle(path / "1" / "bundle")


def is_own_evaluation(path: Path) -> bool:
    """Whether the file is a result of `evaluate`."""
    return {"settings", "environment", "contenders", "schema_version"} <= read_state(path, MAX_DOCUMENT_BYTES).keys()


def is_own_receipt(path: Path) -> bool:
    """Whether the file is a receipt or another state of ours."""
    document = read_state(path, MAX_DOCUMENT_BYTES)
    return "key" in document or set(document) == {"scale"}


def is_own_features(path: Path) -> bool:
    """Whether the file is the state of a set's features."""
    return {"key", "read", "broken"} <= read_state(path, MAX_DOCUMENT_BYTES).keys()


CALIBRATION = OutputKind(
    "a calibration set", lambda path: read_file_kind(path) == CALIBRATION_KEY, "its header does not say so"
)
QDIFFUSION = OutputKind(
    "a calibration set in Q-Diffusion's layout", is_own_qdiffusion, f"it was not made by qdeploy, {OLDER}"
)
TABLE = OutputKind("a table", lambda path: read_file_kind(path) == TABLE_KEY, "its header does not say so")
BUNDLE = OutputKind("a bundle", is_own_bundle, f"it has no {MANIFEST} that lists all its files", is_folder=True)
PICTURE = OutputKind(
    "a picture", lambda path: has_mark(path, mark_from_software(SOFTWARE)), f"it is no PNG by qdeploy, {OLDER}"
)
PLOT = OutputKind(
    "a plot", lambda path: has_mark(path, mark_from_software(PLOT_SOFTWARE)), f"it is no PNG by its plots, {OLDER}"
)
PAGE = OutputKind("a page", lambda path: has_mark(path, PAGE_MARK), f"it is no HTML by qdeploy, {OLDER}")
BENCH_RUN = OutputKind("a measurement", lambda path: has_mark(path, BENCH_MARK), "it does not begin as one")
DEMO_REPORT = OutputKind("a report of the demo", lambda path: has_mark(path, DEMO_REPORT_MARK), "it begins otherwise")
EVALUATION = OutputKind("a result of evaluate", is_own_evaluation, "it is no such JSON")
EVALUATION_TABLE = OutputKind(
    "a table of evaluate",
    lambda path: any(has_mark(path, mark) for mark in EVALUATION_TABLE_MARKS),
    "it does not begin as one",
)
FEATURES = OutputKind(
    "features of pictures", lambda path: is_own_features(path.with_suffix(".json")), "no .json of theirs is there"
)
TRITON_REPOSITORY = OutputKind(
    "a model repository", is_own_repository, f"a config.pbtxt in it does not say {TRITON_MARK!r}", is_folder=True
)
RECEIPT = OutputKind("a receipt", is_own_receipt, "it is no such JSON")
