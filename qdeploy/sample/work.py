"""Make a job's pictures in this process; ``ray_workers`` makes them on a Ray cluster."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from qdeploy.base.encode import save_png
from qdeploy.base.progress import OnProgress
from qdeploy.runtime.pipeline import Pipeline, load
from qdeploy.runtime.results import Step
from qdeploy.sample.job import SampleJob

STEP_NAME = "sample"


class Workers(Protocol):
    """Makes the pictures of all batches, in any order: a number and its PNG file, as soon as it is made."""

    def __call__(
        self, job: SampleJob, batches: Sequence[range], on_progress: OnProgress
    ) -> Iterator[tuple[int, bytes]]:
        """PNG files by the pictures' numbers in the job; each range of ``batches`` is one call of the pipeline."""


def sample_locally(job: SampleJob, batches: Sequence[range], on_progress: OnProgress) -> Iterator[tuple[int, bytes]]:
    """Batch by batch."""
    done, total = 0, sum(map(len, batches))
    with load(job.bundle, engine=job.engine, threads=job.threads, verify=False) as pipe:
        for batch in batches:
            yield from zip(
                batch,
                render_batch(pipe, job, batch, make_step_callback(on_progress, done, len(batch), total)),
                strict=True,
            )
            done += len(batch)


def render_batch(
    pipe: Pipeline, job: SampleJob, batch: range, callback: Callable[[Step], None] | None = None
) -> list[bytes]:
    """The PNG files of pictures of one prompt."""
    result = pipe(
        job.prompt(batch[0]),
        negative_prompt=job.negative_prompt,
        steps=job.steps,
        guidance_scale=job.guidance_scale,
        seed=job.seed,
        first=batch[0],
        count=len(batch),
        scheduler=job.scheduler,
        eta=job.eta,
        callback=callback,
        **job.calls.request_options,
    )
    files = []
    for image in result.images:
        with io.BytesIO() as file:
            save_png(image, file)
            files.append(file.getvalue())
    return files


def make_step_callback(on_progress: OnProgress, done: int, batch: int, total: int) -> Callable[[Step], None]:
    """A callback for the steps of ``batch`` pictures, ``done`` of ``total`` being finished."""

    def callback(step: Step) -> None:
        on_progress(
            f"{STEP_NAME}: steps of all pictures", done * step.count + (step.index + 1) * batch, total * step.count
        )

    return callback
