"""A job's pictures in a folder, each in a file of its own, so that sampling can be stopped at any time."""

from __future__ import annotations

import re
from pathlib import Path

from qdeploy.artifacts.receipt import RecipeStep, read_receipt, write_receipt
from qdeploy.base.errors import UsageError
from qdeploy.base.files import stage_file
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.sample.job import SampleJob
from qdeploy.sample.work import STEP_NAME, Workers, sample_locally

PICTURE_NAME = re.compile(r"\d{6}\.png|\.\d{6}\.png\.\d+\.part")


def sample_to_folder(
    job: SampleJob,
    count: int,
    folder: Path,
    receipts: Path,
    on_progress: OnProgress = ignore_progress,
    batch: int = 8,
    workers: Workers = sample_locally,
) -> None:
    """Write the pictures 000000.png to ``count`` - 1 of this job to ``folder``.

    Existing pictures are kept; those of another bundle or other settings are removed first. ``batch`` pictures
    are denoised together, which an interruption can lose; it changes none of them.
    """
    remove_stale(RecipeStep(STEP_NAME, folder, job.settings, {"bundle": job.bundle_sha256}), receipts)
    missing = [number for number in range(count) if not picture_path(folder, number).is_file()]
    if not missing:
        on_progress(f"{STEP_NAME}: done before", 1, 1)
    for number, file in workers(job, job.batches(missing, batch), on_progress) if missing else ():
        with stage_file(picture_path(folder, number)) as scratch:
            scratch.write_bytes(file)


def remove_stale(step: RecipeStep, receipts: Path) -> None:
    """Remove pictures that were made in another way; UsageError for pictures without a receipt."""
    previous = read_receipt(receipts, step.name).get("key")
    if previous == step.key:
        return
    pictures = [path for path in step.output.glob("*") if PICTURE_NAME.fullmatch(path.name)]
    if pictures and previous is None:
        raise UsageError(
            f"{step.output} holds pictures and {receipts / step.name}.json does not say how they were made; move them "
            "away or give another folder with -o"
        )
    for path in pictures:
        path.unlink()
    write_receipt(receipts, step)


def picture_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"
