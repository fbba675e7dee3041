"""What is mutated: for every kind of file of ours a good one, how a case of it is written, and what then reads it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import qdeploy
from qdeploy.artifacts.bundle import MANIFEST, SCHEDULER, open_bundle
from qdeploy.artifacts.noise_correction import NoiseCorrection, load_noise_correction, save_noise_correction
from qdeploy.artifacts.table import load_table
from qdeploy.base.files import hash_file
from qdeploy.bench.store import read_bench_run, write_bench_run
from qdeploy.evaluate.extractors import ExtractorInfo
from qdeploy.evaluate.result import (
    BundleResult,
    EvaluationResult,
    Reference,
    ReferenceComparison,
    read_result,
    write_result,
)
from qdeploy.inspection.describe import describe
from qdeploy.recipe.read import read_recipe
from qdeploy.runtime.tokenizer import Tokenizer
from tests.hostile.mutate import mutate_bytes, mutate_document

RECIPE = """
[model]
file = "model.ckpt"
[calibrate]
samples = 4
steps = 5
[quantize]
weight_bits = 8
[sample]
prompt = "a cat"
steps = 3
count = 2
"""


@dataclass(frozen=True)
class Case:
    """One hostile file. must_refuse: reading it without an error is wrong."""

    what: str
    must_refuse: bool
    read: Callable[[], object]


Kind = Callable[[random.Random, Path], Case]  # writes a case into a fresh folder


def mutate_json_file(good: Path, read: Callable[[Path], object], open_keys: frozenset[str], rng: random.Random,
                     folder: Path) -> Case:  # fmt: skip
    text, what, must_refuse = mutate_document(json.loads(good.read_text()), rng, open_keys)
    path = folder / good.name
    path.write_text(text)
    return Case(what, must_refuse, partial(read, path))


def mutate_file(good: Path, read: Callable[[Path], object], rng: random.Random, folder: Path) -> Case:
    data, what = mutate_bytes(good.read_bytes(), rng)
    path = folder / good.name
    path.write_bytes(data)
    return Case(what, False, partial(read, path))


def mutate_safetensors(good: Path, key: str, read: Callable[[Path], object], rng: random.Random, folder: Path) -> Case:
    """The JSON document in the header, or the numbers in the arrays."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(good, framework="numpy") as file:
        document = json.loads(file.metadata()[key])
        tensors = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118 - not a dict
    path = folder / good.name
    if rng.random() < 0.7:
        text, what, must_refuse = mutate_document(document, rng, frozenset({"provenance"}))
    else:
        text, must_refuse = json.dumps(document), False
        what = mutate_arrays(tensors, rng)
    save_file(tensors, path, metadata={key: text})
    return Case(what, must_refuse, partial(read, path))


def mutate_arrays(tensors: dict[str, Any], rng: random.Random) -> str:
    name = rng.choice(sorted(tensors))
    array = tensors[name]
    action = rng.choice(("value", "drop", "type", "shape"))
    if action == "drop":
        del tensors[name]
    elif action == "type":
        tensors[name] = array.astype(rng.choice((np.float64, np.int64, np.uint8)))
    elif action == "shape":
        tensors[name] = array.reshape(-1)[: rng.randrange(array.size + 1)].copy()
    elif array.size:
        value = rng.choice((0, -1, 127)) if array.dtype.kind in "iu" else rng.choice((np.nan, np.inf, 0, -1, 6e4))
        with np.errstate(all="ignore"):
            array.reshape(-1)[rng.randrange(array.size)] = np.array(value).astype(array.dtype)
    return f"{action} of {name}"


def relist(bundle: Path, name: str) -> None:
    """The manifest with the size and hash of a file that was changed."""
    document = json.loads((bundle / MANIFEST).read_text())
    for entry in document["files"]:
        if entry["path"] == name:
            entry.update(bytes=(bundle / name).stat().st_size, sha256=hash_file(bundle / name))
    (bundle / MANIFEST).write_text(json.dumps(document))


def mutate_manifest(good: Path, rng: random.Random, folder: Path) -> Case:
    bundle = shutil.copytree(good, folder / "bundle")
    text, what, must_refuse = mutate_document(json.loads((good / MANIFEST).read_text()), rng, frozenset({"provenance"}))
    (bundle / MANIFEST).write_text(text)
    return Case(what, must_refuse, partial(open_bundle, bundle))


def mutate_bundle_file(name: str, good: Path, read: Callable[[Path], object], rng: random.Random, folder: Path) -> Case:
    """A file of a bundle with changed bytes, its hash right again."""
    bundle = Path(shutil.copytree(good, folder / "bundle"))
    data, what = mutate_bytes((bundle / name).read_bytes(), rng)
    (bundle / name).write_bytes(data)
    relist(bundle, name)
    return Case(what, False, partial(read, bundle))


def make_picture(bundle: Path) -> object:
    with qdeploy.load(bundle, threads=1) as pipe:
        return pipe("a cat", steps=1).pixels


def add_to_bundle(good: Path, rng: random.Random, folder: Path) -> Case:
    """Links, strangers, twins of names."""
    bundle = Path(shutil.copytree(good, folder / "bundle"))
    action = rng.choice(("link out", "link in", "loop", "stranger", "hidden", "twin"))
    if action == "link out":
        (bundle / "unet" / "x").symlink_to("/etc/hostname")
    elif action == "link in":
        (bundle / "x").symlink_to(bundle / SCHEDULER)
    elif action == "loop":
        (bundle / "x").symlink_to(bundle)
    elif action == "twin":
        shutil.copytree(bundle / "unet", bundle / "UNET")
    else:
        (bundle / ("stranger" if action == "stranger" else ".hidden")).write_bytes(rng.randbytes(8))
    return Case(action, True, partial(open_bundle, bundle))


def write_good_result(path: Path) -> None:
    comparison = ReferenceComparison("fp32", (0, 1), (30.0, float("inf")), (0.9, 1.0), (), 31.0, 28.0, (20.0,), (1,))
    contender = BundleResult("w8a8", "w8a8", "0" * 64, "W8A8", "W", "pictures", 2, (), {"fid": 1.5}, {"model": "m"},
                             comparison)  # fmt: skip
    info = ExtractorInfo("rgb8", 192, 0, "bilinear", "", False)
    reference = Reference("data", "folder", 2, (16, 16), False, ())
    write_result(path, EvaluationResult({"steps": 2}, {"cpu": "x"}, reference, info, (contender,)))


def build_kinds(bundle: Path, table: Path, calibration: Path, work: Path) -> Mapping[str, Kind]:
    """Every kind, with good files made in ``work``."""
    from qdeploy.calibrate.dataset import load_calibration
    from qdeploy.calibrate.record.qdiffusion import calibration_from_qdiffusion, save_qdiffusion
    from tests.bench.factories import pair

    work.mkdir(parents=True, exist_ok=True)
    length = open_bundle(bundle).manifest.latents.tokens
    result = work / "result.json"
    write_good_result(result)
    bench, recipe, correction = work / "bench.json", work / "recipe.toml", work / "correction.safetensors"
    write_bench_run(bench, pair(0))
    recipe.write_text(RECIPE)
    save_noise_correction(
        correction, NoiseCorrection(np.array([1, 41]), np.zeros(2, np.float32), np.ones((2, 4), np.float32))
    )
    save_qdiffusion(load_calibration(calibration), work / "cali.pt")
    read_tokenizer: Callable[[Path], object] = lambda path: Tokenizer(path, length)(["a cat"])  # noqa: E731
    none = frozenset[str]()
    tokenizer = bundle / "tokenizer" / "tokenizer.json"
    return {
        "manifest": partial(mutate_manifest, bundle),
        "bundle folder": partial(add_to_bundle, bundle),
        "graph": partial(mutate_bundle_file, "unet/model.onnx", bundle, open_bundle),
        "graph to run": partial(mutate_bundle_file, "unet/model.onnx", bundle, make_picture),
        "graph to inspect": partial(mutate_file, bundle / "unet" / "model.onnx", lambda path: describe(str(path))),
        "tokenizer": partial(mutate_json_file, tokenizer, read_tokenizer, none),
        "tokenizer bytes": partial(mutate_file, tokenizer, read_tokenizer),
        "table": partial(mutate_safetensors, table, "qdeploy_table", load_table),
        "table bytes": partial(mutate_file, table, load_table),
        "calibration set": partial(mutate_safetensors, calibration, "qdeploy_calibration", load_calibration),
        "calibration bytes": partial(mutate_file, calibration, load_calibration),
        "q-diffusion": partial(mutate_file, work / "cali.pt", calibration_from_qdiffusion),
        "noise correction": partial(mutate_file, correction, load_noise_correction),
        "bench": partial(mutate_json_file, bench, read_bench_run, frozenset({"environment"})),
        "bench bytes": partial(mutate_file, bench, read_bench_run),
        "result": partial(mutate_json_file, result, read_result, frozenset({"settings", "environment", "provenance"})),
        "recipe": partial(mutate_file, recipe, read_recipe),
    }
