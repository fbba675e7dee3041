"""A bundle's pictures of one recipe, each in a file of its own, so that sampling can be stopped at any time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from qdeploy.errors import UsageError
from qdeploy.files import staged_file
from qdeploy.progress import OnProgress, silent
from qdeploy.recipe.read import Sample
from qdeploy.recipe.receipt import Step, read_receipt, write_receipt
from qdeploy.runtime import pipeline

OURS = re.compile(r"\d{6}\.png|\.\d{6}\.png\.\d+\.part")
NO_MATTER = ("count", "batch")  # settings that change no picture


def sample_to_folder(
    bundle: Path, bundle_sha256: str, sample: Sample, folder: Path, receipts: Path, on_progress: OnProgress = silent
) -> None:
    """Make ``folder`` hold the pictures 000000.png to ``sample.count`` - 1, all of this bundle and these settings."""
    settings = {name: value for name, value in asdict(sample).items() if name not in NO_MATTER}
    make_room(Step("sample", folder, settings, {"bundle": bundle_sha256}), receipts)
    missing = [number for number in range(sample.count) if not picture_file(folder, number).is_file()]
    if missing:
        write_pictures(bundle, sample, missing, folder, on_progress)
    else:
        on_progress("sample: done before", 1, 1)


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


def write_pictures(
    bundle: Path, sample: Sample, numbers: Sequence[int], folder: Path, on_progress: OnProgress = silent
) -> None:
    """Make the pictures ``numbers``, ascending, and write each one as soon as its batch is done."""
    done = 0
    with pipeline.load(bundle, verify=False) as pipe:
        for batch in runs(numbers, sample.batch):
            result = pipe(
                sample.prompt,
                negative_prompt=sample.negative_prompt,
                steps=sample.steps,
                guidance_scale=sample.guidance,
                seed=sample.seed,
                first=batch[0],
                count=len(batch),
                scheduler=sample.sampler,
                eta=sample.eta,
                callback=steps_shown(on_progress, done, len(batch), len(numbers)),
            )
            for number, image in zip(batch, result.images, strict=True):
                with staged_file(picture_file(folder, number)) as scratch:
                    image.save(scratch, format="PNG")
            done += len(batch)


def steps_shown(on_progress: OnProgress, done: int, batch: int, total: int) -> Callable[[pipeline.Step], None]:
    """A callback for the steps of ``batch`` pictures, ``done`` of ``total`` being finished."""

    def callback(step: pipeline.Step) -> None:
        on_progress("sample: steps of all pictures", done * step.count + (step.index + 1) * batch, total * step.count)

    return callback


def runs(numbers: Sequence[int], most: int) -> Iterator[range]:
    """Ascending ``numbers`` as ranges of at most ``most``."""
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1 or end - start == most:
            yield range(numbers[start], numbers[end - 1] + 1)
            start = end


def picture_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"
