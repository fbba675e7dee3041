"""The command line: parse, call one function, print. Heavy imports wait inside the commands."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qdeploy import __version__
from qdeploy.errors import QdeployError, UsageError

if TYPE_CHECKING:
    from qdeploy.models.options import ModelOptions

PATH = click.Path(path_type=Path)


def loading_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say how MODEL is loaded, alike in every command that loads one, which gets ``loading``."""

    @click.option(
        "--lora", "loras", multiple=True, metavar="FILE[:SCALE]",
        help="LoRA in safetensors to fuse into the weights first, times SCALE (1). May be repeated.",
    )  # fmt: skip
    @click.option("--config", type=PATH, help="Original YAML of a checkpoint file, where its tensors say too little.")
    @click.option("--ema", is_flag=True, help="Take the averaged UNet of a checkpoint file.")
    @click.option("--allow-download", is_flag=True, help="Fetch a missing tokenizer from the hub.")
    @functools.wraps(command)
    def with_loading(
        *args: Any, loras: Sequence[str], config: Path | None, ema: bool, allow_download: bool, **kwargs: Any
    ) -> None:
        from qdeploy.models.options import LoraFile, ModelOptions

        fused = tuple(LoraFile.from_text(text) for text in loras)
        command(*args, loading=ModelOptions(fused, config, ema, allow_download), **kwargs)

    return with_loading


def was_typed(name: str) -> bool:
    """Whether the user gave the running command's parameter ``name``, be it with its default value."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


class Commands(click.Group):
    """Turns expected errors into one paragraph and the exit codes 1 (failed) and 2 (misuse)."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QdeployError as exc:
            self._fail(ctx, str(exc), exc.exit_code)
        except OSError as exc:
            self._fail(ctx, f"{exc.strerror or exc}: {exc.filename or 'no file named'}", 1)
        except ModuleNotFoundError as exc:
            if (exc.name or "").startswith("qdeploy"):
                raise
            self._fail(ctx, f"this command needs the package {exc.name!r}; run `pip install 'qdeploy[quantize]'`", 1)

    @staticmethod
    def _fail(ctx: click.Context, text: str, code: int) -> None:
        if ctx.params.get("debug"):
            raise  # noqa: PLE0704 - called from an except block: keep the traceback
        click.echo(f"qdeploy: {' '.join(text.split())}", err=True)  # one paragraph, whatever came
        ctx.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="qdeploy")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--quiet", is_flag=True, help="Show no progress bars.")
@click.pass_context
def main(ctx: click.Context, debug: bool, quiet: bool) -> None:
    """Quantize latent-diffusion models after training and deploy them.

    The way: MODEL -> calibrate -> quantize -> export -> generate, bench. `qdeploy demo` walks it on
    the built-in model. MODEL is a diffusers folder or an original
    .ckpt or .safetensors (Stable Diffusion 1.x, latent diffusion), builtin:emoji or builtin:emoji-uncond.
    """
    ctx.obj = not quiet


@main.command()
@click.option("-o", "--out", type=PATH, default=Path("demo"), show_default=True, help="Folder for everything made.")
@click.option("--samples", default=16, show_default=True, help="Trajectories to calibrate on.")
@click.pass_obj
def demo(show: bool, out: Path, samples: int) -> None:
    """Quantize, export, run and measure the built-in model: two bundles, pictures and a report."""
    from qdeploy.bench.report import print_table
    from qdeploy.demo import run_demo
    from qdeploy.progress import shown

    with shown(show) as on_progress:
        result = run_demo(out, samples=samples, on_progress=on_progress)
    print_table(result.header, result.rows, "FP32 beside W8A8, ONNX Runtime CPU")
    click.echo(f"bundles, pictures (grid.png) and report.md are in {result.folder}")


@main.command()
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


@main.command()
@click.argument("model")
@click.option("--calib", type=PATH, required=True, help="Calibration set of `qdeploy calibrate`.")
@click.option("-o", "--out", type=PATH, required=True, help="Table to write, .safetensors.")
@click.option("--weight-bits", type=click.IntRange(2, 8), default=8, show_default=True)
@click.option("--act-bits", default=8, show_default=True, help="8, the engines' integer kernels.")
@click.option(
    "--observer", type=click.Choice(["minmax", "percentile", "mse"]), default="mse", show_default=True,
    help="How ranges are read off the histograms.",
)  # fmt: skip
@click.option(
    "--equalize/--no-equalize", default=True, show_default=True, help="Per-channel ratios between input and weight."
)
@click.option("--split/--no-split", default=False, show_default=True, help="Split convolutions behind a concatenation.")
@click.option(
    "--timestep-table/--no-timestep-table", default=False, show_default=True,
    help="Precompute all that depends on t alone.",
)  # fmt: skip
@click.option("--keep-float", multiple=True, metavar="NAME", help="UNet layers to keep in float besides; last names.")
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
@click.option("--cache-gb", default=8.0, show_default=True, help="Disk for the blocks' inputs and outputs.")
@click.option("--device", default="cpu", show_default=True, help="Where blocks are fitted: cpu or cuda.")
@click.option("--sensitivity", is_flag=True, help="Measure each layer alone; `inspect` shows it.")
@click.option(
    "--float-macs", default=0.0, show_default=True, help="Share of MACs to keep in float where it helps most."
)
@click.option(
    "--max-mb", type=float, help="Most MB of integer weights for the UNet: mixes 4 and 8 bits where it hurts least."
)
@click.option(
    "--noise-correction", is_flag=True, help="PTQD: measure the UNet's mean error by step; the runtime takes it off."
)
@click.option("--first-token-float", is_flag=True, help="Keep the text's first token in float in cross-attention.")
@click.option(
    "--attention-bits",
    default=0,
    show_default=True,
    help="Bits of the attentions' own products: 0 (float), 8, or 16, which cannot be exported.",
)
@loading_options
@click.pass_obj
def quantize(show: bool, model: str, calib: Path, out: Path, loading: ModelOptions, **options: Any) -> None:
    """Choose ranges and round MODEL's weights; the result is a QuantTable.

    An interrupted --adaround goes on behind its last finished block when the same command is run again.

    \b
    Examples:
      qdeploy quantize builtin:emoji --calib calibration.safetensors -o w8a8.safetensors
      qdeploy quantize builtin:emoji --calib calibration.safetensors -o w4a8.safetensors --weight-bits 4 --effort fast
    """
    from qdeploy.calibrate.checkpoint import checkpoint_beside
    from qdeploy.calibrate.dataset import load_calibration
    from qdeploy.calibrate.quantize import quantize_model
    from qdeploy.describe_table import widths_text
    from qdeploy.models.source import load_model
    from qdeploy.progress import shown
    from qdeploy.spec import spec_from_options
    from qdeploy.table import save_table

    spec = spec_from_options(**options)
    calibration = load_calibration(calib)
    with shown(show) as on_progress, checkpoint_beside(out) as work:
        loaded = load_model(model, loading)
        table = quantize_model(loaded, calibration, spec, on_progress, work)
        save_table(table, out)
    for name in loaded.components:
        if name not in table.components:
            click.echo(f"{name}: stays in float, the calibration set has no inputs for it")
            continue
        quant = table.components[name]
        click.echo(
            f"{name}: {len(quant.layers)} layers in {widths_text(quant.weight_bits)}A{spec.act_bits} "
            f"({quant.integer_mac_share():.1%} of MACs), {len(quant.float_layers)} in float"
        )
    click.echo(f"wrote {out}")


@main.command()
@click.argument("source", metavar="MODEL|QUANT")
@click.option("-o", "--out", type=PATH, required=True, help="Bundle folder to write.")
@click.option("--target", default="ort-cpu", show_default=True, help="What the graphs are lowered for.")
@click.option("--precision", help="Default: int8 for a QUANT table; for a MODEL fp32, on GPU targets fp16.")
@click.option("--model", help="Where a table's model lies now, if it moved.")
@click.option(
    "--with-encoder",
    is_flag=True,
    help="Add the VAE encoder, in float, which image-to-image and inpainting need; Stable Diffusion's is 137 MB.",
)
@loading_options
@click.pass_obj
def export(
    show: bool, source: str, out: Path, target: str, precision: str | None, model: str | None, with_encoder: bool,
    loading: ModelOptions,
) -> None:  # fmt: skip
    """Write the deployable bundle of a float MODEL or of a QUANT table (with its model).

    A quantized export is gated: every layer of the table must run as an integer kernel, and the
    engine must agree with the simulator on recorded inputs. Targets are ort-cpu, openvino, tensorrt
    (int8 or fp16) and ort-cuda (fp16); the last two have no engine here yet, so ONNX Runtime's CPU
    provider computes their graphs in the gate, and TensorRT-RTX, where it is installed, builds
    those of tensorrt.

    \b
    Examples:
      qdeploy export w8a8.safetensors -o bundle
      qdeploy export w8a8.safetensors -o bundle-tensorrt --target tensorrt
    """
    from qdeploy.describe import gate_texts
    from qdeploy.export.exporter import export_bundle
    from qdeploy.models.source import load_model
    from qdeploy.progress import shown
    from qdeploy.spec import target_named
    from qdeploy.table import load_table

    spec = target_named(target)
    table = load_table(Path(source)) if source.endswith(".safetensors") else None
    natural = spec.float_type if table is None else "int8"
    spec.check_precision(precision or natural)
    if (precision or natural) != natural:
        raise UsageError(f"--precision {precision} does not fit {source}: it exports as {natural}")
    loaded = load_model(model or (source if table is None else table.model), loading)
    with shown(show) as on_progress:
        manifest = export_bundle(loaded, table, spec, out, on_progress, with_encoder=with_encoder)
    for name, info in manifest.components.items():
        if info.engine_sqnr_db is not None:
            click.echo(f"{name}: {'; '.join(gate_texts(info))}")
    click.echo(f"wrote {out}")


@main.command()
@click.argument("recipe", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="Folder for everything made.")
@click.option(
    "--scale", type=click.Choice(["full", "tiny"]), default="full", show_default=True,
    help="tiny runs the recipe on a small random model of its architecture, in about a minute.",
)  # fmt: skip
@click.option("--model", help="Where the recipe's model lies.")
@click.option("--data", type=PATH, help="Where the pictures that it calibrates on lie.")
@click.option("--from-qdiffusion", type=PATH, help="Where its Q-Diffusion .pt set lies.")
@click.option("--pictures", type=click.IntRange(1), help="Pictures to make.")
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

    The same command again goes on where it was stopped. Steps that are finished stay; a changed
    setting or file redoes its step and all behind it, pictures included.

    \b
    Examples:
      qdeploy run recipes/lsun_bedroom_w4a8.toml -o bedroom-trial --scale tiny
      qdeploy run recipes/lsun_bedroom_w4a8.toml -o bedroom --model lsun_beds256.ckpt --pictures 16
    """
    from qdeploy.progress import shown
    from qdeploy.recipe.read import read_recipe
    from qdeploy.recipe.run import run_full
    from qdeploy.recipe.tiny import run_tiny, shrunk

    asked = read_recipe(recipe)
    files = [f"--{name.replace('_', '-')}" for name in ("model", "data", "from_qdiffusion") if was_typed(name)]
    if scale == "tiny" and files:
        raise UsageError(f"{files[0]} does not go with --scale tiny, which makes what it reads")
    asked = (shrunk(asked) if scale == "tiny" else asked).with_files(model, data, from_qdiffusion, pictures)
    with shown(show) as on_progress:
        folder = (run_tiny if scale == "tiny" else run_full)(asked, out, on_progress)
    click.echo(f"{asked.sample.count} pictures are in {folder}")


@main.command()
@click.argument("bundle", type=PATH)
@click.argument("prompt", required=False)
@click.option(
    "-o", "--out", type=PATH, default=Path("out.png"), show_default=True, help="Picture; numbered if several."
)
@click.option("--negative", "--negative-prompt", "negative", default="", help="What the picture is not to show.")
@click.option("--image", type=PATH, help="Picture to start from; cut and scaled to the bundle's size.")
@click.option("--strength", type=float, help="How far to go from --image, 0 to 1. Default: 0.8, with --mask 1.")
@click.option("--mask", type=PATH, help="Picture as large as --image: white is repainted, black kept.")
@click.option("--engine", help="Default: the one the bundle was exported for.")
@click.option("--threads", type=int, help="Default: all cores.")
@click.option("--low-memory", is_flag=True, help="Load each component for its stage only; slower, least memory.")
@click.option("--steps", default=25, show_default=True)
@click.option("--guidance", default=7.5, show_default=True, help="Classifier-free guidance scale; 1 turns it off.")
@click.option(
    "--guidance-rescale", default=0.0, show_default=True, help="0 to 1: takes back what high guidance overexposes."
)
@click.option("--weighting", is_flag=True, help="Read weights in PROMPT: (red:1.3), [less], \\( for a bracket itself.")
@click.option("--seed", default=0, show_default=True)
@click.option("--scheduler", help="pndm, ddim, dpm++, euler, euler-a, unipc or lcm. Default: the bundle's own.")
@click.option("--eta", default=0.0, show_default=True, help="ddim's share of noise, 0 to 1.")
@click.option("--count", default=1, show_default=True, help="Pictures to make.")
@click.pass_obj
def generate(
    show: bool, bundle: Path, prompt: str | None, out: Path, negative: str, image: Path | None,
    strength: float | None, mask: Path | None, engine: str | None, threads: int | None, low_memory: bool, steps: int,
    guidance: float, guidance_rescale: float, weighting: bool, seed: int, scheduler: str | None, eta: float, count: int,
) -> None:  # fmt: skip
    """Make pictures of PROMPT, or without one if BUNDLE is unconditional. Needs no torch.

    --image starts from a picture and --mask repaints part of it; BUNDLE must be exported --with-encoder.

    \b
    Examples:
      qdeploy generate demo/w8a8 "a cat" -o cat.png --guidance 5
      qdeploy generate churches -o church.png --count 4
      qdeploy generate bundle "a red cat" --image cat.png --strength 0.6
      qdeploy generate bundle "a hat" --image cat.png --mask head.png
    """
    from qdeploy.bundle import open_bundle
    from qdeploy.files import staged_file
    from qdeploy.progress import shown
    from qdeploy.runtime.image import read_pictures
    from qdeploy.runtime.pipeline import load
    from qdeploy.runtime.request import check_text

    text_options = ("guidance", "guidance_rescale", "negative", "weighting")
    typed = [f"--{name.replace('_', '-')}" for name in text_options if was_typed(name)]
    manifest = open_bundle(bundle, verify=False).manifest
    check_text(manifest, prompt, typed)
    size = manifest.latents.image_width, manifest.latents.image_height
    picture, mask_picture = read_pictures(image, mask, size)
    with load(bundle, engine=engine, threads=threads, low_memory=low_memory) as pipe, shown(show) as on_progress:
        result = pipe(
            prompt, negative_prompt=negative, image=picture, mask=mask_picture, strength=strength, steps=steps,
            guidance_scale=guidance, guidance_rescale=guidance_rescale, weighting=weighting, seed=seed, count=count,
            scheduler=scheduler, eta=eta, callback=lambda step: on_progress("steps", step.index + 1, step.count),
        )  # fmt: skip
    for number, made in enumerate(result.images):
        path = out if count == 1 else out.with_stem(f"{out.stem}-{number}")
        with staged_file(path) as scratch:
            made.save(scratch, format="PNG")
        click.echo(f"wrote {path}")


@main.command()
@click.argument("bundles", nargs=-1, required=True, type=PATH, metavar="BUNDLE...")
@click.option("--engine", help="Default: each bundle's own.")
@click.option("--threads", type=int, help="Default: all cores.")
@click.option("--steps", default=25, show_default=True, help="Sampler steps of a picture.")
@click.option("--pictures", default=5, show_default=True, help="Pictures timed per bundle.")
@click.option("--json", "json_path", type=PATH, help="Write all figures and raw samples here.")
@click.pass_obj
def bench(
    show: bool, bundles: Sequence[Path], engine: str | None, threads: int | None, steps: int, pictures: int,
    json_path: Path | None,
) -> None:  # fmt: skip
    """Time several bundles in turn within one run; the first fp32 one is the twin for the SQNR.

    Example: qdeploy bench demo/fp32 demo/w8a8 --json bench.json
    """
    from qdeploy.bench.environment import environment
    from qdeploy.bench.fidelity import compare
    from qdeploy.bench.latency import BenchSettings, measure
    from qdeploy.bench.report import print_table, rows_of, write_json
    from qdeploy.progress import shown
    from qdeploy.runtime.pipeline import load

    settings = BenchSettings(steps=steps, pictures=pictures, engine=engine, threads=threads)
    with shown(show) as on_progress:
        figures = measure(bundles, settings, on_progress)
    twin = next((figure for figure in figures if figure.precision == "fp32"), None)
    fidelity = {}
    for figure in figures:
        if twin is not None and figure is not twin:
            with load(twin.path) as reference, load(figure.path) as tested:
                fidelity[figure.name] = compare(reference, tested, [settings.prompt], steps)
    about = environment([figure.engine for figure in figures], threads)
    header, rows = rows_of(figures, fidelity)
    print_table(
        header, rows, "; ".join(f"{name}: {about[name]}" for name in ("cpu", "threads", "integer instructions"))
    )
    if json_path is not None:
        write_json(json_path, figures, fidelity, about)
        click.echo(f"wrote {json_path}")


@main.command()
@click.argument("path")
@click.option("--all", "every", is_flag=True, help="List all layers of a table or an audit, not the foremost alone.")
@click.option("--plot", type=PATH, help="PNG to draw a table's sensitivities into.")
@click.option(
    "--audit", is_flag=True, help="Run a bundle or .onnx file: which layers are not in integers, and the time."
)
@click.option("--engine", help="Engine to audit on; the bundle's own if not given.")
@click.option("--threads", type=int, help="Threads of the engine during the audit; all cores if not given.")
def inspect(path: str, every: bool, plot: Path | None, audit: bool, engine: str | None, threads: int | None) -> None:
    """Say what a model, calibration set, table or bundle holds, and with --audit how an engine runs it.

    \b
    Examples:
      qdeploy inspect demo/w8a8
      qdeploy inspect demo/w8a8 --audit
      qdeploy inspect other/quantized.onnx --audit --engine openvino
      qdeploy inspect w8a8.safetensors --plot sensitivity.png
    """
    from qdeploy.describe import describe, table_to_plot
    from qdeploy.describe_audit import describe_audit
    from qdeploy.plot import plot_sensitivity

    if plot is not None:
        plot_sensitivity(table_to_plot(path), plot)
    facts = describe_audit(Path(path), engine, threads, every) if audit else describe(path, every)
    width = max(len(label) for label, _ in facts)
    for label, value in facts:
        click.echo(f"{label:{width}}  {value}")
    if plot is not None:
        click.echo(f"wrote {plot}")


@main.command()
def doctor() -> None:
    """Say which engines run here and how to install those that do not."""
    from qdeploy.cpu import cpu_model, integer_flags
    from qdeploy.engines.base import engine_named, engine_names
    from qdeploy.errors import EngineUnavailableError

    click.echo(f"qdeploy {__version__}, python {sys.version.split()[0]}")
    click.echo(f"cpu: {cpu_model()} ({' '.join(integer_flags()) or 'instruction sets unknown'})")
    for name in engine_names():
        try:
            versions = ", ".join(f"{package} {version}" for package, version in engine_named(name).versions().items())
            click.echo(f"{name}: {versions}")
        except EngineUnavailableError as exc:
            click.echo(f"{name}: missing. {exc}")


if __name__ == "__main__":
    main()
