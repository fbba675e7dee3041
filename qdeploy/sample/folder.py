"""A job's pictures in a folder, each in a file of its own, so that sampling can be stopped at any time."""

from __future__ import annotations

import re
from pathlib import Path

from qdeploy.artifacts.outputs import PICTURE
from qdeploy.artifacts.receipt import RecipeStep, read_receipt, write_receipt
from qdeploy.base.errors import UsageError, join_names
from qdeploy.base.files import stage_file
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.base.staging import remove_leftovers_below
from qdeploy.sample.job import SampleJob
from qdeploy.sample.work import STEP_NAME, Workers, sample_locally

PICTURE_NAME = re.compile(r"\d{6}\.png")
MARKED = {"marked": True}  # in a receipt: pictures say that they are ours; an older receipt is believed without


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
        with stage_file(picture_path(folder, number), len(file)) as scratch:
            scratch.write_bytes(file)


def remove_stale(step: RecipeStep, receipts: Path) -> None:
    """Remove pictures that were made in another way; UsageError for pictures without a receipt."""
    receipt = read_receipt(receipts, step.name)
    if receipt.get("key") == step.key:
        return
    check_pictures(step.output, receipts)
    pictures = list_pictures(step.output)
    strangers = [path.name for path in pictures if "marked" in receipt and not PICTURE.is_ours(path)]
    if strangers:
        raise UsageError(
            f"{step.output} holds pictures that qdeploy did not make ({join_names(strangers)}), which would be "
            "deleted; move them away or give another folder with -o"
        )
    for path in pictures:
        path.unlink()
    write_receipt(receipts, step, more=MARKED)


def check_pictures(folder: Path, receipts: Path) -> None:
    """UsageError for pictures in ``folder`` without a receipt, before any work; what killed runs left goes."""
    remove_leftovers_below(folder)
    if read_receipt(receipts, STEP_NAME).get("key") is None and list_pictures(folder):
        raise UsageError(
            f"{folder} holds pictures and {receipts / STEP_NAME}.json does not say how they were made; move them "
            "away or give another folder with -o"
        )


def list_pictures(folder: Path) -> list[Path]:
    """Files that are named as a job's pictures."""
    return [path for path in folder.glob("*") if PICTURE_NAME.fullmatch(path.name)]


def picture_path(folder: Path, number: int) -> Path:
    """Six digits, so that names sort by number."""
    return folder / f"{number:06d}.png"
