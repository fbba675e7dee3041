"""`qdeploy calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdeploy.commands import (
    FORECAST,
    GUIDANCE,
    GUIDANCE_INTERVAL,
    PATH,
    SCHEDULERS,
    SEED,
    SHARE,
    SPACED,
    SPEED,
    STEPS,
    Whole,
    add_model_options,
    is_typed,
    prepare_outputs,
)

if TYPE_CHECKING:
    from qdeploy.models.options import ModelOptions


@click.command()
@click.argument("model")
@click.option("-o", "--out", type=PATH, required=True, help="File to write; .pt takes Q-Diffusion's layout.")
@click.option(
    "--mode", type=click.Choice(["timestep_aware", "raw_data", "noise_data"]), default="timestep_aware",
    show_default=True, help="Record sampling runs, noise real pictures, or use only noise (fast, biased).",
)  # fmt: skip
@click.option("--data", type=PATH, help="raw_data: folder of pictures (PNG, JPEG, WebP) or LSUN lmdb.")
@click.option("--prompts", type=PATH, help="Text file, one prompt a line. Default: the model's own or a general list.")
@click.option(
    "--samples", type=Whole(1), default=32, show_default=True, help="Trajectories or pictures, one prompt each."
)
@click.option("--steps", type=STEPS, default=25, show_default=True, help="Denoising steps of each.")
@click.option("--record", type=STEPS, default=25, show_default=True, help="Steps of each to keep, evenly spaced.")
@click.option(
    "--guidance",
    type=GUIDANCE,
    default=7.5,
    show_default=True,
    help="Guidance scale; 1 for few-step models that run without guidance.",
)
@SPEED
@GUIDANCE_INTERVAL
@FORECAST
@click.option("--scheduler", help=f"{SCHEDULERS}{SPACED}. Default: the model's own.")
@click.option("--eta", type=SHARE, default=0.0, show_default=True, help="ddim's share of noise, 0 to 1.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option(
    "--batch", type=Whole(1, 4096), default=8, show_default=True, help="Trajectories or pictures run at once."
)
@click.option("--from-qdiffusion", type=PATH, help="Convert this Q-Diffusion .pt file instead of recording.")
@click.option("--cali-st", type=Whole(1), help="Steps to take from it, evenly spaced. Default: all.")
@click.option("--cali-n", type=Whole(1), help="Samples of each step to take from it. Default: all.")
@add_model_options
@click.pass_obj
def calibrate(show: bool, /, model: str, out: Path, model_options: ModelOptions, **options: Any) -> None:
    """Record the inputs of MODEL's components while it samples pictures.

    An interrupted timestep_aware recording resumes where it stopped when the same command is run again.

    Example: qdeploy calibrate builtin:emoji -o calibration.safetensors --samples 32
    """
    from qdeploy.artifacts.outputs import CALIBRATION, QDIFFUSION
    from qdeploy.base.outputs import Output
    from qdeploy.base.progress import show_progress
    from qdeploy.calibrate.record.modes import (
        QDIFFUSION_SUFFIX,
        CalibrationRequest,
        calibrate_to_file,
        check_request,
        check_text_options,
        list_notes,
    )
    from qdeploy.models.source import load_model

    prepare_outputs(Output(out, QDIFFUSION if out.suffix == QDIFFUSION_SUFFIX else CALIBRATION))
    typed = {name for name in options if is_typed(name)}
    request = CalibrationRequest(**options)
    check_request(request, typed, out)
    loaded = load_model(model, model_options)
    check_text_options(loaded, typed)
    for note in list_notes(loaded, request, typed, model_options):
        click.echo(note, err=True)
    with show_progress(show) as on_progress:
        calibrate_to_file(loaded, request, out, on_progress)
    click.echo(f"wrote {out}")
