"""`qdeploy export`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qdeploy.base.errors import UsageError
from qdeploy.commands import PATH, SCHEDULERS, SPACED, Number, add_model_options, prepare_outputs
from qdeploy.targets.base import DEFAULT_TARGET, describe_targets, load_target

if TYPE_CHECKING:
    from qdeploy.models.options import ModelOptions


@click.command()
@click.argument("source", metavar="MODEL|QUANT")
@click.option("-o", "--out", type=PATH, required=True, help="Bundle folder to write.")
@click.option(
    "--target", default=DEFAULT_TARGET, show_default=True,
    help=f"What the graphs are lowered for: {describe_targets()}.",
)  # fmt: skip
@click.option("--precision", help="Default: int8 for a QUANT table; for a MODEL fp32, on GPU targets fp16.")
@click.option("--model", help="The table's model, if it was moved.")
@click.option(
    "--with-encoder",
    is_flag=True,
    help="Add the VAE encoder, in float, which image-to-image and inpainting need; Stable Diffusion's is 137 MB.",
)
@click.option(
    "--dynamic",
    metavar="DIMS",
    help="Leave open: batch, size (height and width), or batch,size. Default: none, which is fastest.",
)
@click.option(
    "--build", is_flag=True, help="With --target tensorrt: build the engines for this machine's GPU too; minutes each."
)
@click.option(
    "--profile",
    metavar="SIZES",
    help="For graphs with open shapes: batch=MIN:OPT:MAX,height=…,width=… (rows of a UNet call, pixels).",
)
@click.option(
    "--full-range",
    is_flag=True,
    help="Weight codes up to ±127 where CPU targets take those within ±64: slow or refused on CPUs without VNNI.",
)
@click.option(
    "--min-sqnr",
    "min_sqnr_db",
    type=Number(-1000, 1000),
    metavar="DB",
    help="Least SQNR against the float model that a quantized component is exported with. Default: 20 dB less than its "
    "table had when it was made, and 3 at least.",
)
@click.option(
    "--unguided/--guided",
    default=None,
    help="One row a UNet call, for few-step models that run without guidance, or two. Default: as a table was "
    "calibrated; without one, one row where the scheduler is a few-step model's (lcm, or trailing spacing).",
)
@click.option(
    "--scheduler",
    help=f"{SCHEDULERS}{SPACED}; to go into the bundle in place of the model's own, which is needed where that is "
    "another one.",
)
@add_model_options
@click.pass_obj
def export(
    show: bool, source: str, out: Path, target: str, precision: str | None, model: str | None, with_encoder: bool,
    dynamic: str | None, build: bool, profile: str | None, full_range: bool, min_sqnr_db: float | None,
    unguided: bool | None, scheduler: str | None, model_options: ModelOptions,
) -> None:  # fmt: skip
    """Write the deployable bundle of a float MODEL or of a QUANT table (with its model).

    A quantized export is gated: every layer of the table must run as an integer kernel, and the
    engine must agree with the simulator on recorded inputs; a component whose output is mostly error
    is refused (--min-sqnr). Where a target's engine does not run (no NVIDIA GPU), ONNX Runtime's CPU
    provider computes its graphs in the gate; TensorRT-RTX, where it is installed, builds those of
    tensorrt, which needs no GPU.

    Native TensorRT builds an engine when a graph is first loaded, in minutes, and keeps it in the
    user's cache; --build puts it into the bundle instead, for GPUs and TensorRT of this machine's kind.

    \b
    Examples:
      qdeploy export w8a8.safetensors -o bundle
      qdeploy export w8a8.safetensors -o bundle-any-size --dynamic batch,size
      qdeploy export w8a8.safetensors -o bundle-tensorrt --target tensorrt
      qdeploy export w8a8.safetensors -o bundle-tensorrt --target tensorrt --build
    """
    from qdeploy.artifacts.file_kind import is_table
    from qdeploy.artifacts.outputs import BUNDLE
    from qdeploy.artifacts.table import load_table
    from qdeploy.base.disk import note_kept
    from qdeploy.base.outputs import Output
    from qdeploy.base.progress import show_progress
    from qdeploy.engines.nvidia.profiles import sizes_from_text
    from qdeploy.export.exporter import export_bundle
    from qdeploy.export.open_dims import OpenDims
    from qdeploy.export.plans import check_buildable
    from qdeploy.inspection.describe import format_gate
    from qdeploy.models.few_step_loras import advise_loras
    from qdeploy.models.source import load_model
    from qdeploy.sampling import replace_scheduler
    from qdeploy.sampling.few_steps import recognise_few_steps

    prepare_outputs(Output(out, BUNDLE))
    open_dims = OpenDims.from_text(dynamic)
    chosen = load_target(target).in_full_range() if full_range else load_target(target)
    table = load_table(Path(source)) if is_table(source) else None
    default_precision = chosen.choose_precision(table is not None)
    chosen.check_precision(precision or default_precision)
    if (precision or default_precision) != default_precision:
        raise UsageError(f"--precision {precision} does not fit {source}: it exports as {default_precision}")
    sizes = None if profile is None else sizes_from_text(profile)
    if build:
        check_buildable(chosen)
    loaded = load_model(model or (source if table is None else table.model), model_options)
    if scheduler is not None:
        loaded = replace(loaded, scheduler_config=replace_scheduler(loaded.scheduler_config, scheduler))
    for note in advise_loras(model_options.loras, loaded.scheduler_config):
        click.echo(note, err=True)
    with show_progress(show) as on_progress, note_kept(lambda: f"nothing is kept: {out} is as it was"):
        manifest = export_bundle(
            loaded, table, chosen, out, on_progress, with_encoder=with_encoder, open_dims=open_dims, sizes=sizes,
            build=build, min_sqnr_db=min_sqnr_db, unguided=unguided,
        )  # fmt: skip
    reason = recognise_few_steps(loaded.scheduler_config)
    if unguided is None and table is None and loaded.is_guided and reason is not None:
        click.echo(f"unet: one row a call, since the scheduler is a few-step model's ({reason}); --guided gives it two")
    for name, info in manifest.components.items():
        if info.engine_sqnr_db is not None:
            click.echo(f"{name}: {'; '.join(format_gate(info))}")
    click.echo(f"wrote {out}")
