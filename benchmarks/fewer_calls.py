"""What fewer model calls cost and save: ``python -m benchmarks.fewer_calls`` makes, measures and times every row.

Each row is a way to make the same pictures (``fewer_rows.py``) with a bundle in fp32 and one in W8A8 of a built-in
model. Quality: PSNR of every picture to the fp32 bundle's with all calls, and to a converged trajectory's; KID and FID
to the training pictures. Cost: model calls, rows of the UNet, and milliseconds, timed in turns. Pictures, features and
figures stay in the work folder, so that an interrupted run resumes where it stopped.

    python -m training.reference --work DIR -o PICTURES    the training pictures of builtin:emoji, for KID and FID
    python -m benchmarks.fewer_calls --reference PICTURES
    python -m benchmarks.fewer_calls --speeds --reference PICTURES      only the rows of `--speed`
    python -m benchmarks.fewer_calls --steps 25 --window default --reference PICTURES    a part of the rows
    python -m benchmarks.fewer_calls --no-times --reference PICTURES    quality only, whatever else runs
    python -m training.reference --work DIR --unconditional -o CREATURES
    python -m benchmarks.fewer_calls --model builtin:emoji-uncond --reference CREATURES
    python -m benchmarks.fewer_calls --bundle fp32=A --bundle w8a8=B --times-only    other bundles: times and memory
"""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.fewer_figures import PRECISIONS, add_times, compare_losses, format_table, write_report
from benchmarks.fewer_quality import study_quality
from benchmarks.fewer_rows import WINDOWS
from benchmarks.fewer_times import time_bundles
from qdeploy.base.errors import UsageError
from qdeploy.base.progress import show_progress
from qdeploy.demo import GUIDANCE

HERE = Path(__file__).parent
MODELS = ("builtin:emoji", "builtin:emoji-uncond")
WORK = HERE / "work" / "fewer_calls"
STEPS = (25, 50)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--work", type=click.Path(path_type=Path), default=WORK, help="Folder of everything made.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "fewer_calls.json", help="Report to write.")
@click.option("--reference", type=click.Path(path_type=Path, exists=True), help="Training pictures, for KID and FID.")
@click.option("--model", type=click.Choice(MODELS), default=MODELS[0], show_default=True, help="Whose bundles.")
@click.option("--count", type=click.IntRange(2), default=256, show_default=True, help="Pictures a row.")
@click.option("--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS), help="Default: both.")
@click.option("--steps", multiple=True, type=click.IntRange(2), default=STEPS, show_default=True, help="Of a picture.")
@click.option(
    "--window", "windows", multiple=True, type=click.Choice(list(WINDOWS)), help="Of forecasts. Default: all."
)
@click.option("--no-times", is_flag=True, help="Quality only.")
@click.option("--speeds", is_flag=True, help="Only the rows of --speed: exact, balanced and fast.")
@click.option("--guidance", default=GUIDANCE, show_default=True, help="Guidance scale of the pictures.")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Rounds of timed pictures.")
@click.option("--threads", type=click.IntRange(1), help="Of timed pictures. Default: all cores.")
@click.option("--bundle", "others", multiple=True, metavar="PRECISION=FOLDER", help="With --times-only: these bundles.")
@click.option("--times-only", is_flag=True, help="Times and memory of --bundle, such as one of SD's size.")
def main(
    work: Path, out: Path, reference: Path | None, model: str, count: int, precisions: tuple[str, ...],
    steps: tuple[int, ...], windows: tuple[str, ...], no_times: bool, speeds: bool,
    guidance: float, rounds: int, threads: int | None, others: tuple[str, ...], times_only: bool,
) -> None:  # fmt: skip
    """Make what is missing, measure it, and write the report."""
    if times_only != bool(others):
        raise UsageError("--bundle and --times-only go together: give both, or neither")
    windows = () if speeds else windows or tuple(WINDOWS)
    with show_progress() as on_progress:
        if times_only:
            bundles = dict(map(parse_bundle, others))
            figures = time_bundles("other", bundles, steps, windows, rounds, threads, on_progress)
        else:
            folder = work / model.removeprefix("builtin:")
            figures, bundles = study_quality(
                model, folder, count, precisions or PRECISIONS, steps, windows, reference, guidance, on_progress
            )
            if not no_times:
                times = time_bundles(model, bundles, steps, windows, rounds, threads, on_progress)
                figures = add_times(figures, times)
    write_report(out, figures)
    click.echo(format_table(figures))
    for note in compare_losses(figures):
        click.echo(note)


def parse_bundle(text: str) -> tuple[str, Path]:
    """``PRECISION=FOLDER``; UsageError for anything else."""
    precision, _, folder = text.partition("=")
    if precision not in PRECISIONS or not Path(folder).is_dir():
        raise UsageError(f"--bundle: got {text!r}, expected {' or '.join(PRECISIONS)}=FOLDER of a bundle")
    return precision, Path(folder)


if __name__ == "__main__":
    main()
