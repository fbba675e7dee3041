"""A job's pictures in a folder, each in a file of its own, so that sampling can be stopped at any time."""

from __future__ import annotations

import re
from pathlib import Path

from qdeploy.errors import UsageError
from qdeploy.files import staged_file
from qdeploy.progress import OnProgress, silent
from qdeploy.receipt import Step, read_receipt, write_receipt
from qdeploy.sample.job import Job
from qdeploy.sample.work import WHAT, Workers, in_this_process

OURS = re.compile(r"\d{6}\.png|\.\d{6}\.png\.\d+\.part")


def sample_to_folder(
    job: Job,
    count: int,
    folder: Path,
    receipts: Path,
    on_progress: OnProgress = silent,
    batch: int = 8,
    workers: Workers = in_this_process,
) -> None:
    """Make ``folder`` hold the pictures 000000.png to ``count`` - 1, all of this job.

    Pictures that are there stay; those of another bundle or other settings are removed first. ``batch`` pictures
    go through the sampler together, what an interruption can lose; it changes none of them.
    """
    make_room(Step(WHAT, folder, job.settings, {"bundle": job.bundle_sha256}), receipts)
    missing = [number for number in range(count) if not picture_file(folder, number).is_file()]
    if not missing:
        on_progress(f"{WHAT}: done before", 1, 1)
    for number, file in workers(job, job.batches(missing, batch), on_progress) if missing else ():
        with staged_file(picture_file(folder, number)) as scratch:
            scratch.write_bytes(file)


def make_room(step: Step, receipts: Path) -> None:
    """Take away pictures that were made another way; UsageError for some of which no receipt speaks."""
    before = read_receipt(receipts, step.name).get("key")
    if before == step.key:
        return
    found = [path for path in step.made.glob("*") if OURS.fullmatch(path.name)]
    if found and before is None:
        raise UsageError(
            f"{step.made} holds pictures and {receipts / step.name}.json does not say how they were made; move them "
            "away or give another folder with -o"
        )
    for path in found:
        path.unlink()
    write_receipt(receipts, step)


def picture_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"
