"""Run a recipe: calibrate, quantize, export, sample; steps that were finished before are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.artifacts import outputs
from qdeploy.artifacts.receipt import RecipeStep, hash_path, read_receipt, run_step
from qdeploy.artifacts.table import load_table, save_table
from qdeploy.base.errors import ModelError, UsageError
from qdeploy.base.files import stage_file
from qdeploy.base.outputs import Output, OutputKind, check_room
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.calibrate.checkpoint import checkpoint_folder
from qdeploy.calibrate.dataset_file import load_calibration
from qdeploy.calibrate.quantize import estimate_table_bytes, quantize_model
from qdeploy.calibrate.record.modes import calibrate_to_file, check_text_options
from qdeploy.export.exporter import export_bundle
from qdeploy.models.architectures import check_architecture
from qdeploy.models.source import LatentDiffusion, hash_model, load_model
from qdeploy.recipe.read import CALIBRATION, Recipe
from qdeploy.sample.folder import check_pictures, sample_to_folder
from qdeploy.sample.work import STEP_NAME
from qdeploy.sampling import make_scheduler
from qdeploy.sampling.choose_settings import choose_scheduler_settings

TABLE, BUNDLE, PICTURES, RECEIPTS = "table.safetensors", "bundle", "pictures", "receipts"
FILES = ("data", "prompts", "from_qdiffusion")  # options of `calibrate` that name files


def list_outputs(folder: Path) -> list[Output]:
    """What a recipe writes to ``folder`` and, from an earlier run, replaces; pictures have a check of their own."""
    steps = {"calibrate": (CALIBRATION, outputs.CALIBRATION), "quantize": (TABLE, outputs.TABLE)}
    files = [
        Output(folder / file, claim_by_receipt(kind, folder / RECEIPTS / f"{step}.json"))
        for step, (file, kind) in steps.items()
    ]
    receipts = (*steps, "export", STEP_NAME, "scale")
    files += [Output(folder / RECEIPTS / f"{name}.json", outputs.RECEIPT) for name in receipts]
    return [*files, Output(folder / BUNDLE, outputs.BUNDLE)]


def claim_by_receipt(kind: OutputKind, receipt: Path) -> OutputKind:
    """``kind``, also known by the receipt of the step that wrote it: a damaged file is made again."""
    return replace(kind, is_ours=lambda path: kind.is_ours(path) or outputs.is_own_receipt(receipt))


class FloatModel:
    """The recipe's float model: hashed at once, loaded when a step first needs it."""

    def __init__(self, sha256: str, make: Callable[[], LatentDiffusion]) -> None:
        self.sha256 = sha256
        self._make = make
        self._loaded: LatentDiffusion | None = None

    def load(self) -> LatentDiffusion:
        """The model, loaded once."""
        if self._loaded is None:
            self._loaded = self._make()
        return self._loaded

    def unload(self) -> None:
        """Free its memory."""
        self._loaded = None


def run_full(recipe: Recipe, folder: Path, on_progress: OnProgress = ignore_progress) -> Path:
    """Run ``recipe`` on its own model and files, writing to ``folder``; the pictures' folder."""
    check_files(recipe)
    check_scale(folder, "full")
    sha256 = hash_model(recipe.model.file, recipe.model.options)
    return run_recipe(recipe, FloatModel(sha256, lambda: load_recipe_model(recipe)), folder, on_progress)


def run_recipe(recipe: Recipe, model: FloatModel, folder: Path, on_progress: OnProgress = ignore_progress) -> Path:
    """Write calibration set, table, bundle and pictures to ``folder``; the pictures' folder.

    A second run does what is missing: steps whose settings or inputs changed, all following ones, and pictures.
    """
    request, spec, target, sample = recipe.calibrate, recipe.quantize, recipe.target, recipe.sample
    calibration, table, bundle = folder / CALIBRATION, folder / TABLE, folder / BUNDLE

    def calibrate() -> None:
        calibrate_to_file(model.load(), request, calibration, on_progress)

    def quantize() -> None:
        with checkpoint_folder(table) as work:
            check_room(table, estimate_table_bytes(model.load()))
            save_table(quantize_model(model.load(), load_calibration(calibration), spec, on_progress, work), table)

    def export() -> None:
        quant_table = load_table(table)
        export_bundle(
            model.load(), quant_table, target, bundle, on_progress,
            with_encoder=recipe.with_encoder, min_sqnr_db=recipe.min_sqnr_db,
        )  # fmt: skip

    def run_one(
        name: str, made: Path, settings: dict[str, Any], made_from: dict[str, str], make: Callable[[], None]
    ) -> str:
        return run_step(
            RecipeStep(name, made, settings, {"model": model.sha256, **made_from}), receipts, make, on_progress
        )

    receipts = folder / RECEIPTS
    check_pictures(folder / PICTURES, receipts)
    input_hashes = {name: hash_path(path) for name in FILES if (path := getattr(request, name)) is not None}
    settings = {name: value for name, value in asdict(request).items() if name not in FILES}  # at any path
    calibration_sha256 = run_one("calibrate", calibration, settings, input_hashes, calibrate)
    table_sha256 = run_one(
        "quantize", table, spec.list_result_settings(), {"calibration": calibration_sha256}, quantize
    )
    export_settings = {**target.settings, "with_encoder": recipe.with_encoder}
    bundle_sha256 = run_one("export", bundle, export_settings, {"table": table_sha256}, export)
    model.unload()
    job = sample.job(bundle, bundle_sha256)
    sample_to_folder(job, sample.count, folder / PICTURES, receipts, on_progress, sample.batch)
    return folder / PICTURES


def load_recipe_model(recipe: Recipe) -> LatentDiffusion:
    """The model in the recipe's file, checked to be the one that the recipe is about."""
    model = load_model(recipe.model.file, recipe.model.options)
    if recipe.model.architecture is not None:
        check_architecture(model, recipe.model.architecture)
    check_model(model, recipe)
    return model


def check_model(model: LatentDiffusion, recipe: Recipe) -> None:
    """UsageError or RequestError where pictures could not be made as the recipe says, before hours are spent on it."""
    check_text_options(model, recipe.typed)
    sample = recipe.sample
    if model.reads_text != (sample.prompt is not None):
        problem = "needs a prompt" if model.reads_text else "has a prompt, and its model reads no text"
        raise UsageError(f"{recipe.name}: [sample] {problem}")
    config = choose_scheduler_settings(model.scheduler_config, sample.scheduler, sample.calls)
    make_scheduler(config, sample.steps, eta=sample.eta, rng=np.random.default_rng(0))


def check_files(recipe: Recipe) -> None:
    """ModelError or UsageError for a file that the recipe reads and that is not there."""
    file, name = recipe.model.file, recipe.model.architecture or "the model"
    if not file.startswith("builtin:") and not Path(file).exists():
        raise ModelError(
            f"{recipe.name} needs {file}, which is not there: put {name} at that path or give another with "
            "--model; --scale tiny needs no file"
        )
    for option in FILES:
        path = getattr(recipe.calibrate, option)
        if path is not None and not path.exists():
            raise UsageError(
                f"{recipe.name} needs {path} ([calibrate] {option}), which is not there: put it at that path"
                + (f" or give another with --{option.replace('_', '-')}" if option != "prompts" else "")
            )


def check_scale(folder: Path, scale: str) -> None:
    """UsageError when ``folder`` holds a run at another scale: a trial must not replace a run of days."""
    previous = read_receipt(folder / RECEIPTS, "scale").get("scale")
    if previous is None:
        with stage_file(folder / RECEIPTS / "scale.json") as scratch:
            scratch.write_text(json.dumps({"scale": scale}) + "\n", "utf-8")
    elif previous != scale:
        raise UsageError(f"{folder} holds a run with --scale {previous}; give another folder with -o")
