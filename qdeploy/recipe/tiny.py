"""``--scale tiny``: the same recipe on a small random model, with stand-ins for the files that it reads.

Sizes alone are changed (samples, steps, iterations, pictures); every other setting stays the recipe's own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.modes import Request
from qdeploy.calibrate.prompts import draw_prompts, read_prompts
from qdeploy.calibrate.qdiffusion import save_qdiffusion
from qdeploy.calibrate.timestep_aware import TimestepAware, record_trajectories
from qdeploy.errors import UsageError
from qdeploy.files import staged_folder
from qdeploy.models.architectures import ARCHITECTURES
from qdeploy.models.random_model import random_model
from qdeploy.models.source import LatentDiffusion
from qdeploy.progress import OnProgress, silent
from qdeploy.receipt import Step, finish
from qdeploy.recipe.read import Recipe
from qdeploy.recipe.run import RECEIPTS, FloatModel, check_model, check_scale, run_recipe
from qdeploy.runtime.image import image_from_pixels
from qdeploy.spec import QuantSpec

SAMPLES, STEPS, ITERATIONS, PICTURES = 2, 2, 2, 2
PICTURE_SIDE = 40


def run_tiny(recipe: Recipe, folder: Path, on_progress: OnProgress = silent) -> Path:
    """Run a :func:`shrunk` recipe in ``folder``; the pictures' folder. UsageError when it names no architecture."""
    if recipe.model.architecture is None:
        raise UsageError(
            f"{recipe.name}: --scale tiny needs [model] architecture, one of {', '.join(ARCHITECTURES)}; add it"
        )
    check_scale(folder, "tiny")
    model = random_model(recipe.model.architecture)
    tiny = with_stand_ins(recipe, model, folder, on_progress)
    check_model(model, tiny)
    return run_recipe(tiny, FloatModel(model.sha256, lambda: model), folder, on_progress)


def shrunk(recipe: Recipe) -> Recipe:
    """The recipe with every size that costs time cut down."""
    request, sample = recipe.calibrate, recipe.sample
    return replace(
        recipe,
        calibrate=replace(request, samples=min(request.samples, SAMPLES), steps=min(request.steps, STEPS)),
        quantize=shrunk_spec(recipe.quantize),
        sample=replace(sample, steps=min(sample.steps, STEPS), count=min(sample.count, PICTURES)),
    )


def shrunk_spec(spec: QuantSpec) -> QuantSpec:
    """``spec`` with a short reconstruction, where it has one."""
    if spec.reconstruction is None:
        return spec
    return replace(
        spec, reconstruction=replace(spec.reconstruction, iterations=ITERATIONS, samples=SAMPLES, batch=SAMPLES)
    )


def with_stand_ins(recipe: Recipe, model: LatentDiffusion, folder: Path, on_progress: OnProgress = silent) -> Recipe:
    """The recipe reading a few random pictures and a recording of ``model`` in place of its own files."""
    stand_ins: dict[str, Path] = {}
    request, receipts = recipe.calibrate, folder / RECEIPTS
    if request.data is not None:
        made = stand_ins["data"] = folder / "stand-ins" / "pictures"
        step = Step("stand-in-pictures", made, {"count": SAMPLES, "side": PICTURE_SIDE}, {})
        finish(step, receipts, lambda: write_pictures(made), on_progress)
    if request.from_qdiffusion is not None:
        recorded = stand_ins["from_qdiffusion"] = folder / "stand-ins" / "qdiffusion.pt"
        settings = {"cali_st": request.cali_st, "cali_n": request.cali_n, "sampler": recipe.sample.sampler}
        step = Step("stand-in-qdiffusion", recorded, settings, {"model": model.sha256})
        finish(step, receipts, lambda: save_qdiffusion(recording(model, recipe), recorded), on_progress)
    return recipe.with_files(**stand_ins)  # type: ignore[arg-type]


def write_pictures(folder: Path) -> None:
    """A folder of random PNG files."""
    rng = np.random.default_rng(0)
    with staged_folder(folder) as scratch:
        for number in range(SAMPLES):
            pixels = rng.integers(0, 256, (PICTURE_SIDE, PICTURE_SIDE, 3), np.uint8)
            image_from_pixels(pixels).save(scratch / f"{number}.png")


def recording(model: LatentDiffusion, recipe: Recipe) -> CalibrationSet:
    """What the recipe's sampler gives the UNet, with the steps and samples that it takes from a Q-Diffusion set."""
    request: Request = recipe.calibrate
    samples, steps = request.cali_n or SAMPLES, request.cali_st or STEPS
    prompts = [] if model.text_encoder is None else draw_prompts(read_prompts(None, model.folder), samples, 0)
    guidance, sampler = recipe.sample.guidance, recipe.sample.sampler
    return record_trajectories(model, prompts, TimestepAware(samples, steps, steps, guidance, sampler))
