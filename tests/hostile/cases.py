"""How a hostile file is written: a good one with a changed document, changed bytes or changed arrays."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.mutate import Rules, mutate_bytes, mutate_document

OPTIONAL = ("latents", "input_ids")  # a calibration set in Q-Diffusion's layout has none
POSITIVE = ("weight_scale",)  # arrays that hold nothing but finite numbers above 0


@dataclass(frozen=True)
class Case:
    """One hostile file. must_refuse: reading it without an error is wrong."""

    what: str
    must_refuse: bool
    read: Callable[[], object]


Kind = Callable[[random.Random, Path], Case]  # writes a case into a fresh folder


def mutate_json_file(
    good: Path, read: Callable[[Path], object], rules: Rules, rng: random.Random, folder: Path
) -> Case:
    text, what, must_refuse = mutate_document(json.loads(good.read_text()), rng, rules)
    path = folder / good.name
    path.write_text(text)
    return Case(what, must_refuse, partial(read, path))


def mutate_file(good: Path, read: Callable[[Path], object], rng: random.Random, folder: Path) -> Case:
    data, what = mutate_bytes(good.read_bytes(), rng)
    path = folder / good.name
    path.write_bytes(data)
    return Case(what, False, partial(read, path))


def mutate_safetensors(
    good: Path, key: str, read: Callable[[Path], object], rules: Rules, rng: random.Random, folder: Path
) -> Case:
    """The JSON document in the header, or the numbers in the arrays."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(good, framework="numpy") as file:
        document = json.loads(file.metadata()[key])
        tensors = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118 - not a dict
    path = folder / good.name
    if rng.random() < 0.7:
        text, what, must_refuse = mutate_document(document, rng, rules)
    else:
        text = json.dumps(document)
        what, must_refuse = mutate_arrays(tensors, rng)
    save_file(tensors, path, metadata={key: text})
    return Case(what, must_refuse, partial(read, path))


def mutate_arrays(tensors: dict[str, Any], rng: random.Random) -> tuple[str, bool]:
    """One array of ``tensors`` changed in place; what was done, and whether no reader may take it."""
    name = rng.choice(sorted(tensors))
    before = tensors[name]
    action = rng.choice(("value", "value", "drop", "type", "shape"))
    if action == "drop":
        del tensors[name]
        return f"drop of {name}", name not in OPTIONAL
    if action == "type":
        tensors[name] = before.astype(rng.choice((np.float64, np.int16, np.bool_)))
        return f"{name} as {tensors[name].dtype}", tensors[name].dtype != before.dtype
    if action == "shape" or not before.size:
        tensors[name] = before.reshape(-1)[: rng.randrange(before.size + 1)].copy()
        return f"{tensors[name].shape} of {name}", False
    is_integer = before.dtype.kind in "iu"
    value = rng.choice((0, -1, 127) if is_integer else (np.nan, np.inf, 0, -1, 6e4))
    with np.errstate(all="ignore"):
        before.reshape(-1)[rng.randrange(before.size)] = np.array(value).astype(before.dtype)
    is_impossible = not is_integer and (not np.isfinite(value) or (name.endswith(POSITIVE) and value <= 0))
    return f"{value} in {name}", is_impossible
