"""`qdeploy run`."""

from __future__ import annotations

from pathlib import Path

import click

from qdeploy.base.errors import UsageError
from qdeploy.commands import PATH, Whole, is_typed, prepare_outputs


@click.command()
@click.argument("recipe", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="Folder for everything made.")
@click.option(
    "--scale", type=click.Choice(["full", "tiny"]), default="full", show_default=True,
    help="tiny runs the recipe on a small random model of its architecture, in about a minute.",
)  # fmt: skip
@click.option("--model", help="Path of the recipe's model.")
@click.option("--data", type=PATH, help="Path of the pictures that it calibrates on.")
@click.option("--from-qdiffusion", type=PATH, help="Path of its Q-Diffusion .pt set.")
@click.option("--pictures", type=Whole(1), help="Pictures to make.")
@click.pass_obj
def run(
    show: bool, recipe: Path, out: Path, scale: str, model: str | None, data: Path | None,
    from_qdiffusion: Path | None, pictures: int | None,
) -> None:  # fmt: skip
    """Run RECIPE, an experiment in a TOML file: calibrate, quantize, export and sample.

    The repository's recipes/ folder holds eight. A recipe has the sections [model], [calibrate],
    [quantize], [export] and [sample], whose keys are the options of the commands; its paths are
    taken from the folder that you run it in. OUT gets calibration.safetensors, table.safetensors,
    bundle/, pictures/ and a receipt for each step.

    The same command again resumes where it was stopped. Finished steps are kept; a changed
    setting or file redoes its step and all following ones, pictures included.

    \b
    Examples:
      qdeploy run recipes/lsun_bedroom_w4a8.toml -o bedroom-trial --scale tiny
      qdeploy run recipes/lsun_bedroom_w4a8.toml -o bedroom --model lsun_beds256.ckpt --pictures 16
    """
    from qdeploy.base.disk import note_kept
    from qdeploy.base.progress import show_progress
    from qdeploy.recipe.read import read_recipe
    from qdeploy.recipe.run import list_outputs, run_full
    from qdeploy.recipe.tiny import run_tiny, shrink

    prepare_outputs(*list_outputs(out), folder=out)
    loaded = read_recipe(recipe)
    files = [f"--{name.replace('_', '-')}" for name in ("model", "data", "from_qdiffusion") if is_typed(name)]
    if scale == "tiny" and files:
        raise UsageError(f"{files[0]} does not go with --scale tiny, which makes what it reads")
    loaded = (shrink(loaded) if scale == "tiny" else loaded).replace_files(model, data, from_qdiffusion, pictures)
    kept = f"finished steps and pictures are kept in {out}: the same command goes on from there"
    with show_progress(show) as on_progress, note_kept(lambda: kept):
        folder = (run_tiny if scale == "tiny" else run_full)(loaded, out, on_progress)
    click.echo(f"{loaded.sample.count} pictures are in {folder}")
