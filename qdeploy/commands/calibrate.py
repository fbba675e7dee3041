"""`qdeploy calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdeploy.commands import PATH, loading_options, was_typed

if TYPE_CHECKING:
    from qdeploy.models.options import ModelOptions


@click.command()
@click.argument("model")
@click.option("-o", "--out", type=PATH, required=True, help="File to write; .pt takes Q-Diffusion's layout.")
@click.option(
    "--mode", type=click.Choice(["timestep_aware", "raw_data", "noise_data"]), default="timestep_aware",
    show_default=True, help="Record the sampler's run, noise real pictures, or take noise alone (fast, biased).",
)  # fmt: skip
@click.option("--data", type=PATH, help="raw_data: folder of pictures (PNG, JPEG, WebP) or LSUN lmdb.")
@click.option("--prompts", type=PATH, help="Text file, one prompt a line. Default: the model's own or a general list.")
@click.option("--samples", default=32, show_default=True, help="Trajectories or pictures, one prompt each.")
@click.option("--steps", default=25, show_default=True, help="Sampler steps of each.")
@click.option("--record", default=25, show_default=True, help="Steps of each to keep, evenly spaced.")
@click.option("--guidance", default=7.5, show_default=True, help="Classifier-free guidance scale.")
@click.option("--sampler", help="pndm, ddim, dpm++, euler, euler-a, unipc or lcm. Default: the model's own.")
@click.option("--eta", default=0.0, show_default=True, help="ddim's share of noise, 0 to 1.")
@click.option("--seed", default=0, show_default=True)
@click.option("--batch", default=8, show_default=True, help="Trajectories or pictures run at once.")
@click.option("--from-qdiffusion", type=PATH, help="Convert this Q-Diffusion .pt file instead of recording.")
@click.option("--cali-st", type=int, help="Steps to take from it, evenly spaced. Default: all.")
@click.option("--cali-n", type=int, help="Samples of each step to take from it. Default: all.")
@loading_options
@click.pass_obj
def calibrate(show: bool, model: str, out: Path, loading: ModelOptions, **options: Any) -> None:
    """Record what MODEL's components are really given while it samples pictures.

    An interrupted timestep_aware recording goes on where it stopped when the same command is run again.

    Example: qdeploy calibrate builtin:emoji -o calibration.safetensors --samples 32
    """
    from qdeploy.calibrate.modes import Request, calibrate_to_file, check_request, check_text
    from qdeploy.models.source import load_model
    from qdeploy.progress import shown

    given = {name for name in options if was_typed(name)}
    request = Request(**options)
    check_request(request, given, out)
    loaded = load_model(model, loading)
    check_text(loaded, given)
    with shown(show) as on_progress:
        calibrate_to_file(loaded, request, out, on_progress)
    click.echo(f"wrote {out}")
