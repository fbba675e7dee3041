"""`qdeploy quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdeploy.commands import MILLION, PATH, SHARE, Number, Whole, add_model_options, prepare_outputs

if TYPE_CHECKING:
    from qdeploy.models.options import ModelOptions


@click.command()
@click.argument("model")
@click.option("--calib", type=PATH, required=True, help="Calibration set of `qdeploy calibrate`.")
@click.option("-o", "--out", type=PATH, required=True, help="Table to write, .safetensors.")
@click.option("--weight-bits", type=Whole(2, 8), default=8, show_default=True)
@click.option(
    "--observer", type=click.Choice(["minmax", "percentile", "mse"]), default="mse", show_default=True,
    help="How ranges are read off the histograms.",
)  # fmt: skip
@click.option(
    "--equalize/--no-equalize", default=True, show_default=True, help="Per-channel ratios between input and weight."
)
@click.option(
    "--gptq/--no-gptq",
    default=True,
    show_default=True,
    help="Round weights for the least error of the layer's output instead of the weight; --adaround learns it instead.",
)
@click.option(
    "--full-range",
    is_flag=True,
    help="Choose 8-bit weights only for codes up to ±127, not for ±64 too; for tables that only GPUs use.",
)
@click.option("--split/--no-split", default=False, show_default=True, help="Split convolutions of a concatenation.")
@click.option(
    "--timestep-table/--no-timestep-table", default=False, show_default=True,
    help="Precompute everything that depends only on t.",
)  # fmt: skip
@click.option("--keep-float", multiple=True, metavar="NAME", help="UNet layers to keep in float too; last names.")
@click.option(
    "--adaround/--no-adaround",
    default=None,
    help="Learn the rounding, block by block. Default: where weights have less than 8 bits.",
)
@click.option("--effort", type=click.Choice(["fast", "standard", "paper"]), default="standard", show_default=True)
@click.option(
    "--learn-act-scales/--no-learn-act-scales", default=False, show_default=True,
    help="Learn each layer's input scale with its rounding.",
)  # fmt: skip
@click.option(
    "--cache-gb",
    type=Number(0, MILLION, min_open=True),
    default=8.0,
    show_default=True,
    help="Disk for the blocks' inputs and outputs.",
)
@click.option("--device", default="cpu", show_default=True, help="Where blocks are fitted: cpu or cuda.")
@click.option("--sensitivity", is_flag=True, help="Measure each layer by itself; `inspect` shows it.")
@click.option(
    "--precise-end/--no-precise-end",
    default=True,
    show_default=True,
    help="Spend some percent of a step's time on the convolutions that make most of the last steps' noise.",
)
@click.option(
    "--precise-macs",
    type=SHARE,
    default=0.0,
    show_default=True,
    help="Share of MACs to add where it helps most: inputs in two passes, outputs of convolutions in float.",
)
@click.option(
    "--max-mb",
    type=Number(0, MILLION, min_open=True),
    help="Most MB of integer weights for the UNet: mixes 4 and 8 bits where it hurts least.",
)
@click.option(
    "--noise-correction", is_flag=True, help="PTQD: measure the UNet's mean error by step; the runtime subtracts it."
)
@click.option("--first-token-float", is_flag=True, help="Keep the text's first token in float in cross-attention.")
@click.option(
    "--attention-bits",
    type=Whole(0, 16),
    default=0,
    show_default=True,
    help="Bits of the attentions' own products: 0 (float), 8, or 16, which cannot be exported.",
)
@add_model_options
@click.pass_obj
def quantize(show: bool, /, model: str, calib: Path, out: Path, model_options: ModelOptions, **options: Any) -> None:
    """Choose ranges and round MODEL's weights; the result is a QuantTable.

    An interrupted --adaround resumes after its last finished block when the same command is run again.

    \b
    Examples:
      qdeploy quantize builtin:emoji --calib calibration.safetensors -o w8a8.safetensors
      qdeploy quantize builtin:emoji --calib calibration.safetensors -o w4a8.safetensors --weight-bits 4 --effort fast
    """
    from qdeploy.artifacts.outputs import TABLE
    from qdeploy.artifacts.table import save_table
    from qdeploy.base.numerics import ACT_BITS
    from qdeploy.base.outputs import Output, check_room
    from qdeploy.base.progress import show_progress
    from qdeploy.calibrate.checkpoint import checkpoint_folder
    from qdeploy.calibrate.dataset_file import load_calibration
    from qdeploy.calibrate.quantize import estimate_table_bytes, quantize_model
    from qdeploy.calibrate.spec import spec_from_options
    from qdeploy.inspection.table import format_widths
    from qdeploy.models.source import load_model

    prepare_outputs(Output(out, TABLE))
    spec = spec_from_options(**options)
    calibration = load_calibration(calib)
    with show_progress(show) as on_progress, checkpoint_folder(out) as work:
        loaded = load_model(model, model_options)
        check_room(out, estimate_table_bytes(loaded))
        table = quantize_model(loaded, calibration, spec, on_progress, work)
        save_table(table, out)
    for name in loaded.components:
        if name not in table.components:
            click.echo(f"{name}: stays in float, the calibration set has no inputs for it")
            continue
        quant = table.components[name]
        click.echo(
            f"{name}: {len(quant.layers)} layers in {format_widths(quant.weight_bits)}A{ACT_BITS} "
            f"({quant.integer_mac_share():.1%} of MACs), {len(quant.float_layers)} in float"
        )
    click.echo(f"wrote {out}")
