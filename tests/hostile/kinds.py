"""The kinds of our own files: for each a good one, how a case of it is written, and what then reads it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import qdeploy
from qdeploy.artifacts.bundle import SCHEDULER, open_bundle
from qdeploy.artifacts.manifest import MANIFEST
from qdeploy.artifacts.noise_correction import NoiseCorrection, load_noise_correction, save_noise_correction
from qdeploy.artifacts.table import load_table
from qdeploy.base.files import hash_file
from qdeploy.bench.store import read_bench_run, write_bench_run
from qdeploy.engines.nvidia.plans import KEY_SUFFIX, PlanKey, cache_plan, read_cached_plan
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
from tests.hostile.cases import Case, Kind, mutate_file, mutate_json_file, mutate_safetensors
from tests.hostile.mutate import Rules, mutate_bytes, mutate_document, to_text

RECIPE: Mapping[str, Any] = {
    "model": {"file": "model.ckpt"},
    "calibrate": {"samples": 4, "steps": 5},
    "quantize": {"weight_bits": 8},
    "sample": {"prompt": "a cat", "steps": 3, "count": 2},
}
SIDES = dict.fromkeys(("height", "width", "image_height", "image_width"), (1, 2**20))
MANIFEST_RULES = Rules(
    open_keys=frozenset({"provenance"}),
    free_keys=frozenset({"components", "inputs", "outputs"}),
    ranges={
        **SIDES, "schema_version": (1, 1), "weight_bits": (2, 32), "act_bits": (8, 32), "channels": (1, 1024),
        "tokens": (0, 2**16), "bytes": (0, 2**53), "shape": (-1, 2**20), "integer_mac_share": (0, 1),
        "scaling_factor": (1e-300, 1e300), "largest_weight_code": (0, 128),
    },
)  # fmt: skip
TABLE_RULES = Rules(
    open_keys=frozenset({"provenance"}),
    ranges={"weight_bits": (2, 8), "shape": (1, 2**31), "zero_point": (0, 255), "scale": (1.5e-45, 3.4e38),
            "macs": (0, 2**53), "passes": (1, 2)},
)  # fmt: skip
TOKENIZER_RULES = Rules(free_keys=frozenset({"vocab", "special_tokens"}))
CALIBRATION_RULES = Rules(open_keys=frozenset({"provenance"}))


def relist(bundle: Path, name: str) -> None:
    """The manifest with the size and hash of a file that was changed."""
    document = json.loads((bundle / MANIFEST).read_text())
    for entry in document["files"]:
        if entry["path"] == name:
            entry.update(bytes=(bundle / name).stat().st_size, sha256=hash_file(bundle / name))
    (bundle / MANIFEST).write_text(json.dumps(document))


def mutate_manifest(good: Path, rng: random.Random, folder: Path) -> Case:
    bundle = shutil.copytree(good, folder / "bundle")
    text, what, must_refuse = mutate_document(json.loads((good / MANIFEST).read_text()), rng, MANIFEST_RULES)
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


def write_good_result(path: Path, name: str = "w8a8") -> None:
    infinite = float("inf")
    comparison = ReferenceComparison(name, (0, 1), (30.0, infinite), (0.9, 1.0), (), 31.0, 28.0, (20.0,), (1,))
    contender = BundleResult(
        name, name, "0" * 64, "W8A8", "W", "pictures", 2, (), {"fid": 1.5}, {"model": "m"}, comparison
    )
    info = ExtractorInfo("rgb8", 192, 0, "bilinear", "", False)
    reference = Reference("data", "folder", 2, (16, 16), False, ())
    write_result(path, EvaluationResult({"steps": 2}, {"cpu": "x"}, reference, info, (contender,)))


def mutate_recipe(rng: random.Random, folder: Path) -> Case:
    """A recipe with another value, or one key more or less."""
    text, what, must_refuse = mutate_document(RECIPE, rng, Rules(), to_toml)
    (folder / "recipe.toml").write_text(text, errors="surrogatepass")
    return Case(what, must_refuse, partial(read_recipe, folder / "recipe.toml"))


def to_toml(document: Any) -> str:
    """TOML's inline form, which is JSON's but for the signs; what TOML cannot say is written as JSON does."""

    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {inline(item)}" for key, item in value.items()) + "}"
        return "[" + ", ".join(map(inline, value)) + "]" if isinstance(value, list) else to_text(value)

    return "".join(f"{json.dumps(key)} = {inline(value)}\n" for key, value in document.items())


def mutate_plan_key(rng: random.Random, folder: Path) -> Case:
    """The key next to a cached TensorRT engine."""
    key = PlanKey("0" * 64, "10.13", "9.0", "{}")
    plan = cache_plan(folder, key, b"native code")
    text, what, must_refuse = mutate_document(json.loads(plan.with_suffix(KEY_SUFFIX).read_text()), rng, Rules())
    plan.with_suffix(KEY_SUFFIX).write_text(text)
    return Case(what, must_refuse, lambda: read_cached_plan(folder, key))


def build_kinds(bundle: Path, table: Path, calibration: Path, work: Path) -> Mapping[str, Kind]:
    """Every kind, with good files made in ``work``."""
    from qdeploy.calibrate.dataset_file import load_calibration
    from qdeploy.calibrate.record.qdiffusion import calibration_from_qdiffusion, save_qdiffusion
    from tests.bench.factories import pair

    work.mkdir(parents=True, exist_ok=True)
    length = open_bundle(bundle).manifest.latents.tokens
    result = work / "result.json"
    write_good_result(result)
    bench, recipe, correction = work / "bench.json", work / "recipe.toml", work / "correction.safetensors"
    write_bench_run(bench, pair(0))
    recipe.write_text(to_toml(RECIPE))
    read_recipe(recipe)
    save_noise_correction(
        correction, NoiseCorrection(np.array([1, 41]), np.zeros(2, np.float32), np.ones((2, 4), np.float32))
    )
    save_qdiffusion(load_calibration(calibration), work / "cali.pt")
    read_tokenizer: Callable[[Path], object] = lambda path: Tokenizer(path, length)(["a cat"])  # noqa: E731
    result_rules = Rules(frozenset({"settings", "environment", "provenance"}), free_keys=frozenset({"figures"}))
    tokenizer = bundle / "tokenizer" / "tokenizer.json"
    return {
        "manifest": partial(mutate_manifest, bundle),
        "bundle folder": partial(add_to_bundle, bundle),
        "graph": partial(mutate_bundle_file, "unet/model.onnx", bundle, open_bundle),
        "graph to run": partial(mutate_bundle_file, "unet/model.onnx", bundle, make_picture),
        "graph to inspect": partial(mutate_file, bundle / "unet" / "model.onnx", lambda path: describe(str(path))),
        "tokenizer": partial(
            mutate_json_file, tokenizer, read_tokenizer, Rules(free_keys=frozenset({"vocab", "special_tokens"}))
        ),
        "tokenizer bytes": partial(mutate_file, tokenizer, read_tokenizer),
        "table": partial(mutate_safetensors, table, "qdeploy_table", load_table, TABLE_RULES),
        "table bytes": partial(mutate_file, table, load_table),
        "calibration set": partial(
            mutate_safetensors, calibration, "qdeploy_calibration", load_calibration, CALIBRATION_RULES
        ),
        "calibration bytes": partial(mutate_file, calibration, load_calibration),
        "q-diffusion": partial(mutate_file, work / "cali.pt", calibration_from_qdiffusion),
        "noise correction": partial(mutate_file, correction, load_noise_correction),
        "bench": partial(mutate_json_file, bench, read_bench_run, Rules(frozenset({"environment"}))),
        "bench bytes": partial(mutate_file, bench, read_bench_run),
        "result": partial(mutate_json_file, result, read_result, result_rules),
        "recipe": mutate_recipe,
        "recipe bytes": partial(mutate_file, recipe, read_recipe),
        "plan key": mutate_plan_key,
    }
