"""Running a recipe: calibrate, quantize, export, sample; every step that was finished before is left as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from qdeploy.calibrate.checkpoint import checkpoint_beside
from qdeploy.calibrate.conditioning import scheduler_config
from qdeploy.calibrate.dataset import load_calibration
from qdeploy.calibrate.modes import calibrate_to_file, check_text
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.errors import ModelError, UsageError
from qdeploy.export.exporter import export_bundle
from qdeploy.files import staged_file
from qdeploy.models.architectures import check_architecture
from qdeploy.models.source import LatentDiffusion, load_model, model_sha256
from qdeploy.progress import OnProgress, silent
from qdeploy.receipt import Step, finish, identity, read_receipt
from qdeploy.recipe.read import CALIBRATION, Recipe
from qdeploy.sample.folder import sample_to_folder
from qdeploy.sampling import make_sampler
from qdeploy.table import load_table, save_table

TABLE, BUNDLE, PICTURES, RECEIPTS = "table.safetensors", "bundle", "pictures", "receipts"
FILES = ("data", "prompts", "from_qdiffusion")  # options of `calibrate` that name files


class FloatModel:
    """The recipe's float model: its hash at once, itself when a step first needs it."""

    def __init__(self, sha256: str, make: Callable[[], LatentDiffusion]) -> None:
        self.sha256 = sha256
        self._make = make
        self._loaded: LatentDiffusion | None = None

    def loaded(self) -> LatentDiffusion:
        """The model, loaded once."""
        if self._loaded is None:
            self._loaded = self._make()
        return self._loaded

    def forget(self) -> None:
        """Free its memory."""
        self._loaded = None


def run_full(recipe: Recipe, folder: Path, on_progress: OnProgress = silent) -> Path:
    """Run ``recipe`` on its own model and files, with ``folder`` for everything made; the pictures' folder."""
    check_files(recipe)
    check_scale(folder, "full")
    sha256 = model_sha256(recipe.model.file, recipe.model.options)
    return run_recipe(recipe, FloatModel(sha256, lambda: model_of(recipe)), folder, on_progress)


def run_recipe(recipe: Recipe, model: FloatModel, folder: Path, on_progress: OnProgress = silent) -> Path:
    """Make ``folder`` hold calibration set, table, bundle and pictures; the pictures' folder.

    A second run does what is missing: steps whose settings or inputs changed, all behind them, and pictures.
    """
    request, spec, target, sample = recipe.calibrate, recipe.quantize, recipe.target, recipe.sample
    calibration, table, bundle = folder / CALIBRATION, folder / TABLE, folder / BUNDLE

    def calibrate() -> None:
        calibrate_to_file(model.loaded(), request, calibration, on_progress)

    def quantize() -> None:
        with checkpoint_beside(table) as work:
            save_table(quantize_model(model.loaded(), load_calibration(calibration), spec, on_progress, work), table)

    def export() -> None:
        rounded = load_table(table)
        export_bundle(model.loaded(), rounded, target, bundle, on_progress, with_encoder=recipe.with_encoder)

    def done(name: str, made: Path, settings: dict, made_from: dict[str, str], make: Callable[[], None]) -> str:
        return finish(Step(name, made, settings, {"model": model.sha256, **made_from}), receipts, make, on_progress)

    receipts = folder / RECEIPTS
    read = {name: identity(path) for name in FILES if (path := getattr(request, name)) is not None}
    settings = {name: value for name, value in asdict(request).items() if name not in FILES}  # wherever they lie
    calibrated = done("calibrate", calibration, settings, read, calibrate)
    quantized = done("quantize", table, asdict(spec), {"calibration": calibrated}, quantize)
    wanted = asdict(target) | ({"with_encoder": True} if recipe.with_encoder else {})  # older receipts still hold
    exported = done("export", bundle, wanted, {"table": quantized}, export)
    model.forget()
    job = sample.job(bundle, exported)
    sample_to_folder(job, sample.count, folder / PICTURES, receipts, on_progress, sample.batch)
    return folder / PICTURES


def model_of(recipe: Recipe) -> LatentDiffusion:
    """The model in the recipe's file, checked to be the one that the recipe is about."""
    model = load_model(recipe.model.file, recipe.model.options)
    if recipe.model.architecture is not None:
        check_architecture(model, recipe.model.architecture)
    check_model(model, recipe)
    return model


def check_model(model: LatentDiffusion, recipe: Recipe) -> None:
    """UsageError or RequestError where pictures could not be made as the recipe says, before hours are spent on it."""
    check_text(model, recipe.given)
    sample = recipe.sample
    if model.reads_text != (sample.prompt is not None):
        wanted = "needs a prompt" if model.reads_text else "has a prompt, and its model reads no text"
        raise UsageError(f"{recipe.name}: [sample] {wanted}")
    config = scheduler_config(model, sample.sampler)
    make_sampler(config, sample.steps, eta=sample.eta, rng=np.random.default_rng(0))


def check_files(recipe: Recipe) -> None:
    """ModelError or UsageError for a file that the recipe reads and that is not there."""
    file, name = recipe.model.file, recipe.model.architecture or "the model"
    if not file.startswith("builtin:") and not Path(file).exists():
        raise ModelError(
            f"{recipe.name} needs {file}, which is not there: put {name} at that place or say where it lies with "
            "--model; --scale tiny needs no file"
        )
    for option in FILES:
        path = getattr(recipe.calibrate, option)
        if path is not None and not path.exists():
            raise UsageError(
                f"{recipe.name} needs {path} ([calibrate] {option}), which is not there: put it at that place"
                + (f" or say where it lies with --{option.replace('_', '-')}" if option != "prompts" else "")
            )


def check_scale(folder: Path, scale: str) -> None:
    """UsageError when ``folder`` holds a run at another scale: no trial takes the place of a run of days."""
    before = read_receipt(folder / RECEIPTS, "scale").get("scale")
    if before is None:
        with staged_file(folder / RECEIPTS / "scale.json") as scratch:
            scratch.write_text(json.dumps({"scale": scale}) + "\n", "utf-8")
    elif before != scale:
        raise UsageError(f"{folder} holds a run with --scale {before}; give another folder with -o")
