"""``--scale tiny``: the same recipe on a small random model, with stand-ins for the files that it reads.

Only sizes are changed (samples, steps, iterations, pictures); every other setting stays the recipe's own, but for the
call schedule: so few steps may have no call within a guidance interval, and too few to forecast any.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from qdeploy.artifacts.receipt import RecipeStep, run_step
from qdeploy.base.errors import UsageError
from qdeploy.base.files import stage_folder
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.record.modes import CalibrationRequest
from qdeploy.calibrate.record.prompts import draw_prompts, read_prompts
from qdeploy.calibrate.record.qdiffusion import save_qdiffusion
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.models.architectures import ARCHITECTURES
from qdeploy.models.random_model import make_random_model
from qdeploy.models.source import LatentDiffusion
from qdeploy.recipe.read import Recipe
from qdeploy.recipe.run import RECEIPTS, FloatModel, check_model, check_scale, run_recipe
from qdeploy.runtime.image import image_from_pixels
from qdeploy.sampling.call_schedule import EVERY_CALL

SAMPLES, STEPS, ITERATIONS, PICTURES = 2, 2, 2, 2
PICTURE_SIDE = 40


def run_tiny(recipe: Recipe, folder: Path, on_progress: OnProgress = ignore_progress) -> Path:
    """Run a recipe of :func:`shrink` in ``folder``; the pictures' folder. UsageError when it names no architecture."""
    if recipe.model.architecture is None:
        raise UsageError(
            f"{recipe.name}: --scale tiny needs [model] architecture, one of {', '.join(ARCHITECTURES)}; add it"
        )
    check_scale(folder, "tiny")
    model = make_random_model(recipe.model.architecture)
    tiny = add_stand_ins(recipe, model, folder, on_progress)
    check_model(model, tiny)
    return run_recipe(tiny, FloatModel(model.sha256, lambda: model), folder, on_progress)


def shrink(recipe: Recipe) -> Recipe:
    """The recipe with every size that costs time cut down."""
    request, sample, every_call = recipe.calibrate, recipe.sample, EVERY_CALL.request_options
    return replace(
        recipe,
        calibrate=replace(
            request,
            samples=min(request.samples, SAMPLES),
            steps=min(request.steps, STEPS),
            **every_call,
        ),
        quantize=shrink_spec(recipe.quantize),
        sample=replace(sample, steps=min(sample.steps, STEPS), count=min(sample.count, PICTURES), **every_call),
    )


def shrink_spec(spec: QuantSpec) -> QuantSpec:
    """``spec`` with a short reconstruction, where it has one."""
    if spec.reconstruction is None:
        return spec
    return replace(
        spec, reconstruction=replace(spec.reconstruction, iterations=ITERATIONS, samples=SAMPLES, batch=SAMPLES)
    )


def add_stand_ins(
    recipe: Recipe, model: LatentDiffusion, folder: Path, on_progress: OnProgress = ignore_progress
) -> Recipe:
    """The recipe reading a few random pictures and a recording of ``model`` instead of its own files."""
    stand_ins: dict[str, Path] = {}
    request, receipts = recipe.calibrate, folder / RECEIPTS
    if request.data is not None:
        pictures = stand_ins["data"] = folder / "stand-ins" / "pictures"
        step = RecipeStep("stand-in-pictures", pictures, {"count": SAMPLES, "side": PICTURE_SIDE}, {})
        run_step(step, receipts, lambda: write_pictures(pictures), on_progress)
    if request.from_qdiffusion is not None:
        recording_path = stand_ins["from_qdiffusion"] = folder / "stand-ins" / "qdiffusion.pt"
        settings = {"cali_st": request.cali_st, "cali_n": request.cali_n, "scheduler": recipe.sample.scheduler}
        step = RecipeStep("stand-in-qdiffusion", recording_path, settings, {"model": model.sha256})
        run_step(step, receipts, lambda: save_qdiffusion(record_stand_in(model, recipe), recording_path), on_progress)
    return recipe.replace_files(**stand_ins)  # type: ignore[arg-type]


def write_pictures(folder: Path) -> None:
    """A folder of random PNG files."""
    rng = np.random.default_rng(0)
    with stage_folder(folder) as scratch:
        for number in range(SAMPLES):
            pixels = rng.integers(0, 256, (PICTURE_SIDE, PICTURE_SIDE, 3), np.uint8)
            image_from_pixels(pixels).save(scratch / f"{number}.png")


def record_stand_in(model: LatentDiffusion, recipe: Recipe) -> CalibrationSet:
    """Record the UNet's inputs for the steps and samples that the recipe takes from a Q-Diffusion set."""
    request: CalibrationRequest = recipe.calibrate
    samples, steps = request.cali_n or SAMPLES, request.cali_st or STEPS
    prompts = [] if not model.reads_text else draw_prompts(read_prompts(None, model.folder), samples, 0)
    guidance, scheduler = recipe.sample.guidance, recipe.sample.scheduler
    return record_trajectories(model, prompts, TimestepAwareSettings(samples, steps, steps, guidance, scheduler))
