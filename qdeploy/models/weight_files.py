"""Find the weight files of a model folder, and check that they are complete before anything is read."""

from __future__ import annotations

import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qdeploy.base.errors import ModelError, join_names
from qdeploy.models.config_files import check_regular, read_config

SUFFIX = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
INDICES = "position_ids"
SHARD = r"-\d{5}-of-\d{5}"
INDEX = re.compile(rf".+{SUFFIX}\.index(\.[\w-]+)?\.json")  # which of several files holds which weight
MAX_HEADER_BYTES = 16 * 2**20  # the tensors' names and shapes; Stable Diffusion's take 0.2 MiB
MAX_TENSORS = 100_000


def check_weight_files(folder: Path, parts: tuple[str, ...], remedy: str) -> None:
    """ModelError that names the first weight file of ``parts`` that is shorter or longer than its header says.

    Only headers are read. Not all libraries that load the weights would name the file.
    """
    for part in parts:
        for path in sorted((folder / part).iterdir()):
            if path.suffix == SUFFIX:
                check_safetensors(path, remedy)
                _refuse_codes(path)
            elif INDEX.fullmatch(path.name):
                _check_index(path, remedy)
            elif path.suffix in (*PICKLES, ".json", ".txt") and not path.is_dir():
                check_regular(path)


def check_safetensors(path: Path, remedy: str = "copy the file again") -> None:
    """ModelError unless ``path`` is a regular file as long as its header says."""
    check_regular(path)
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    try:
        if header_bytes > min(MAX_HEADER_BYTES, path.stat().st_size):
            raise ValueError(f"a header of {header_bytes:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
        with safe_open(path, framework="numpy") as file:
            count = len(file.keys())
    except (SafetensorError, ValueError) as exc:
        raise ModelError(
            f"{path} is cut or damaged: it has {path.stat().st_size:,} bytes, which is not what its header "
            f"says ({exc}); {remedy}"
        ) from exc
    if count > MAX_TENSORS:  # before each becomes an object
        raise ModelError(f"{path} holds {count:,} tensors, expected at most {MAX_TENSORS:,}; {remedy}")


def _check_index(path: Path, remedy: str) -> None:
    """ModelError unless the index names files next to it, which must be there."""
    files = read_config(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ModelError(
            f"{path} `weight_map`: got {reprlib.repr(files)}, expected the weights' names and their files; {remedy}"
        )
    for name in sorted(set(files.values())):
        if "/" in name or "\\" in name or not name.endswith(SUFFIX):
            raise ModelError(
                f"{path} `weight_map`: got the file {name[:100]!r}, expected the name of a {SUFFIX} file in the "
                f"same folder; {remedy}"
            )
        if not (path.parent / name).exists():
            raise ModelError(f"{path} names {name[:100]!r}, which is not there; {remedy}")


def _refuse_codes(path: Path) -> None:
    """ModelError for weights that are whole numbers, which the libraries would take for weights as they are."""
    with safe_open(path, framework="numpy") as file:
        types = {name: file.get_slice(name).get_dtype() for name in file.keys() if not name.endswith(INDICES)}  # noqa: SIM118
    codes = [f"{name} ({dtype})" for name, dtype in types.items() if not dtype.startswith(("F", "BF"))]
    if codes:
        raise ModelError(
            f"{path} holds {join_names(codes)}, expected real numbers; a quantized model is not read: give the one "
            "that it was made from"
        )


def choose_variant(folder: Path, stem: str) -> str | None:
    """The variant of the weights ``STEM.VARIANT.safetensors`` to load; None for ``STEM.safetensors`` itself.

    ModelError names what is there instead, or between which ones to choose.
    """
    names = sorted(path.name for path in folder.iterdir())
    if f"{stem}{SUFFIX}" in names or f"{stem}{SUFFIX}.index.json" in names:
        return None
    pattern = re.compile(rf"{stem}\.([\w-]+?)(?:{SHARD})?{SUFFIX}|{stem}{SHARD}\.([\w-]+){SUFFIX}")
    matches = {name: match[1] or match[2] for name in names if (match := pattern.fullmatch(name))}
    variants = sorted(set(matches.values()))
    if len(variants) == 1:
        return variants[0]
    if variants:
        raise ModelError(
            f"{folder} has weights only in the variants {', '.join(variants)}; keep the files of the one to load, or "
            f"name them {stem}{SUFFIX}"
        )
    raise ModelError(f"{folder} has no {stem}{SUFFIX}; {_describe_others(folder, names, stem)}")


def list_weight_files(folder: Path, stem: str) -> list[Path]:
    """The files of the weights that :func:`choose_variant` chooses: one, or all shards."""
    variant = choose_variant(folder, stem)
    named = "" if variant is None else rf"\.{re.escape(variant)}"
    pattern = re.compile(rf"{stem}{named}({SHARD})?{SUFFIX}|{stem}{SHARD}{named}{SUFFIX}")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def count_weights(files: Iterable[Path]) -> dict[str, int]:
    """Weights by their type as the headers name it: ``F32``, ``F16``, ``BF16``."""
    counts: Counter[str] = Counter()
    for path in files:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                counts[tensor.get_dtype()] += math.prod(tensor.get_shape())
    return dict(counts)


def _describe_others(folder: Path, names: list[str], stem: str) -> str:
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return (
            f"there is {join_names(pickles)}, a pickle, which may run code and is not read: save the model as "
            "safetensors, in diffusers with `pipeline.save_pretrained(FOLDER, safe_serialization=True)`"
        )
    others = [name for name in names if name.lower().endswith(SUFFIX)]
    if others:
        return f"there is {join_names(others)}; give it the name {stem}{SUFFIX} if it is this model's"
    return f"there is {join_names(names) or 'nothing'}; copy the whole pipeline folder"
