"""`qdeploy evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qdeploy.base.errors import UsageError
from qdeploy.commands import (
    GUIDANCE,
    PATH,
    SCHEDULERS,
    SEED,
    SPACED,
    STEPS,
    THREADS,
    Whole,
    add_call_options,
    prepare_outputs,
)

if TYPE_CHECKING:
    from qdeploy.sampling.call_schedule import CallSchedule


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=PATH, metavar="BUNDLE...")
@click.option("-o", "--out", type=PATH, required=True, help="Folder for everything made.")
@click.option(
    "--metrics", default="fid,kid,pr,psnr,ssim,sqnr", show_default=True,
    help="Some of fid, kid, is, pr (precision and recall), clip, psnr, ssim, lpips, sqnr (of each step).",
)  # fmt: skip
@click.option("--reference", type=PATH, help="Folder of pictures, LSUN lmdb, or a bundle (fp32: the reference bundle).")
@click.option("--reference-count", type=Whole(2, 2 * 10**7), help="Its pictures to use, by the seed. Default: all.")
@click.option("--fit", is_flag=True, help="Cut and scale the reference's pictures to the bundles' size (bicubic).")
@click.option("--count", type=Whole(2), default=256, show_default=True, help="Pictures a bundle.")
@click.option("--prompts", type=PATH, help="Text file, one a line: picture i has line i, starting over at the end.")
@click.option("--steps", type=STEPS, default=25, show_default=True)
@click.option("--guidance", type=GUIDANCE, default=7.5, show_default=True, help="Classifier-free guidance scale.")
@add_call_options
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--scheduler", help=f"{SCHEDULERS}{SPACED}. Default: each bundle's own.")
@click.option(
    "--batch", type=Whole(1, 4096), default=8, show_default=True, help="Pictures made together; changes none of them."
)
@click.option("--extractor", help="inception, open-nsfw or rgb8. Default: inception if its weights are given.")
@click.option("--inception", type=PATH, help="FID's Inception weights (weights-inception-2015-12-05-6726825d.pth).")
@click.option("--lpips", type=PATH, help="torchvision's AlexNet weights, for lpips.")
@click.option("--clip", type=PATH, help="Folder of a transformers CLIPModel, for clip.")
@click.option("--allow-download", is_flag=True, help="Fetch the weights of inception and lpips.")
@click.option("--skip-broken", is_flag=True, help="Leave pictures out that cannot be read or differ in size; counted.")
@click.option(
    "--ray", is_flag=False, flag_value="local", metavar="[ADDRESS]",
    help="Make pictures on a Ray cluster: at ADDRESS, or without one on this machine's own.",
)  # fmt: skip
@click.option("--engine", help="Default: each bundle's own.")
@click.option("--threads", type=THREADS, help="Of one picture. Default: all cores; on Ray 1.")
@click.option("--html", "html_path", type=PATH, help="Write one page to look at here: pictures, curves, layers.")
@click.option(
    "--table", "tables", multiple=True, metavar="[BUNDLE=]TABLE",
    help="For --html: a table that a bundle was made from, for its layers' SQNR and histograms; may be repeated.",
)  # fmt: skip
@click.pass_obj
def evaluate(
    show: bool, bundles: Sequence[Path], out: Path, metrics: str, reference: Path | None, reference_count: int | None,
    fit: bool, count: int, prompts: Path | None, steps: int, guidance: float, seed: int, scheduler: str | None,
    batch: int, extractor: str | None, inception: Path | None, lpips: Path | None, clip: Path | None,
    allow_download: bool, skip_broken: bool, ray: str | None, engine: str | None, threads: int | None,
    html_path: Path | None, tables: Sequence[str], calls: CallSchedule,
) -> None:  # fmt: skip
    """Measure how good the pictures of BUNDLEs are.

    FID, KID, IS, precision and recall, CLIPScore of all of them; PSNR, SSIM, LPIPS and the SQNR of each step compared
    with the float reference bundle.

    The reference bundle is the --reference if that is fp32, else the first fp32 BUNDLE. OUT gets
    pictures/, features/, result.json, table.md and table.csv; with quantized bundles also
    calibration.csv, the table of calibrations and bits. The same command again makes what is
    missing, so it can be stopped at any time, and --count raised.

    FID, KID and IS are comparable with published figures only with Inception's weights. Without
    them the features are open-nsfw's, a small network that a package carries, and every table says
    so. IS then needs a reference with a folder for each class, to which a classifier is fitted.

    --html makes one self-contained page: figures, pictures of the same seeds with difference maps, the
    SQNR of each step, size against quality. With --table also each layer compared with the float model's, on an
    input that the table recorded, and histograms of the worst (needs torch and the model).

    Put --ray last, or write --ray=ADDRESS: what follows it is taken for the address.

    \b
    Examples:
      qdeploy evaluate demo/w8a8 --reference demo/fp32 --prompts prompts.txt --guidance 5 -o figures
      qdeploy evaluate fp32 w4a8 w8a8 --metrics fid,is,kid --reference emoji -o figures --count 512
      qdeploy evaluate demo/fp32 demo/w8a8 --metrics psnr,ssim,sqnr --prompts prompts.txt -o figures \\
        --html figures/page.html --table demo/w8a8.safetensors
      qdeploy evaluate bedroom/bundle --reference data/lsun/bedroom_train_lmdb --fit --count 50000 \\
        --reference-count 50000 --inception weights-inception-2015-12-05-6726825d.pth -o figures --ray
    """
    from qdeploy.artifacts.outputs import PAGE
    from qdeploy.base.disk import note_kept
    from qdeploy.base.lists import read_prompt_file
    from qdeploy.base.outputs import Output
    from qdeploy.base.progress import show_progress
    from qdeploy.evaluate.extractors import ExtractorOptions
    from qdeploy.evaluate.layer_figures import match_tables
    from qdeploy.evaluate.layers import check_models, measure_layers
    from qdeploy.evaluate.page import build_page
    from qdeploy.evaluate.report import build_calibration_table, build_table, list_notes, write_tables
    from qdeploy.evaluate.run import list_outputs
    from qdeploy.evaluate.run import run_evaluation as run
    from qdeploy.evaluate.settings import EvaluationSettings
    from qdeploy.reporting.page import check_packages, write_page
    from qdeploy.reporting.tables import print_table

    page = [] if html_path is None else [Output(html_path, PAGE, "--html")]
    prepare_outputs(*list_outputs(out), *page, folder=out)
    if tables and html_path is None:
        raise UsageError("--table goes with --html FILE, the page that shows the layers")
    if html_path is not None:
        check_packages()  # before hours of sampling
    matched_tables = match_tables(tables, bundles)
    check_models(matched_tables)
    settings = EvaluationSettings(
        metrics=tuple(name.strip() for name in metrics.split(",") if name.strip()),
        count=count,
        prompts=None if prompts is None else tuple(read_prompt_file(prompts)),
        steps=steps,
        guidance_scale=guidance,
        seed=seed,
        scheduler=scheduler,
        batch=batch,
        reference_count=reference_count,
        fit=fit,
        skip_broken=skip_broken,
        extractor=extractor,
        weights=ExtractorOptions(inception, allow_download, threads),
        clip=clip,
        lpips=lpips,
        engine=engine,
        threads=threads,
        ray=ray,
        calls=calls,
    )
    kept = f"pictures and features made so far are kept in {out}: the same command goes on from there"
    with show_progress(show) as on_progress, note_kept(lambda: kept):
        result = run(bundles, reference, settings, out, on_progress)
        layers = measure_layers(matched_tables, [contender.name for contender in result.contenders], on_progress)
    print_table(*build_table(result), title="")
    table = build_calibration_table([result])
    if table is not None:
        print_table(*table, title="")
    for note in list_notes(result):
        click.echo(note)
    written = [out / "result.json", *write_tables(out, result)]
    if html_path is not None:
        write_page(html_path, build_page(result, out, layers))
        written.append(html_path)
    click.echo("wrote " + ", ".join(map(str, written)))
