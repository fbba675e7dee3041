"""The calls that are timed: a single component, or a whole picture, on inputs that were made before."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qdeploy.artifacts.components import GUIDANCE_INPUT, UNET, choose_graph_batch
from qdeploy.bench.results import DECODE, PICTURE, STEP, TEXT_ENCODER
from qdeploy.bench.settings import BenchSettings
from qdeploy.runtime.pipeline import Pipeline

Call = Callable[[], object]
TIMESTEP = 500


def build_call(stage: str, pipeline: Pipeline, settings: BenchSettings) -> Call | None:
    """What to time of ``stage``, on fixed inputs at the graph's own batch; None where the bundle has no such stage."""
    if stage == PICTURE:
        return lambda: make_picture(pipeline, settings)
    if stage == TEXT_ENCODER:
        return (lambda: pipeline.encode([settings.prompt])) if pipeline.reads_text else None
    rng = np.random.default_rng(0)
    if stage == DECODE:
        latents = rng.standard_normal((1, *pipeline.latents.shape), np.float32)
        return lambda: pipeline.decode(latents)
    assert stage == STEP
    inputs = pipeline.bundle.manifest.unet.inputs
    # size of a dimension that the graph leaves open; both halves of guidance where it reads text
    default_shape = (
        choose_graph_batch(UNET.name, pipeline.reads_text and pipeline.model.guidance_channels is None),
        pipeline.latents.channels,
        pipeline.latents.height,
        pipeline.latents.width,
    )

    def draw_input(name: str) -> np.ndarray:
        shape = [default_shape[axis] if side < 0 else side for axis, side in enumerate(inputs[name].shape)]
        return rng.standard_normal(shape, np.float32)

    x = draw_input("sample")
    own = (*UNET.inputs[:2], GUIDANCE_INPUT)  # the second and third are made by `predict`
    context = {name: draw_input(name) for name in inputs if name not in own}
    return lambda: pipeline.predict(x, TIMESTEP, context)


def make_picture(pipeline: Pipeline, settings: BenchSettings, **options: object) -> object:
    """Prompt or nothing to pixels; ``options`` are passed to the pipeline, such as ``cancel``."""
    prompt = settings.prompt if pipeline.reads_text else None
    options |= settings.calls.request_options
    return pipeline(prompt, steps=settings.steps, guidance_scale=settings.guidance_scale, **options)  # type: ignore[arg-type]
