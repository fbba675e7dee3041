"""`qdeploy bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qdeploy.commands import (
    INTERRUPTED,
    MILLION,
    PATH,
    STEPS,
    THREADS,
    Number,
    Whole,
    add_call_options,
    prepare_outputs,
)

if TYPE_CHECKING:
    from qdeploy.sampling.call_schedule import CallSchedule


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=PATH, metavar="BUNDLE...")
@click.option(
    "--engine",
    "engines",
    multiple=True,
    help="Every bundle on this engine; may be repeated. Default: each bundle's own.",
)
@click.option("--threads", type=THREADS, help="Default: all cores.")
@click.option("--steps", type=STEPS, default=25, show_default=True, help="Denoising steps of a picture.")
@add_call_options
@click.option(
    "--rounds",
    type=Whole(1, 100_000),
    default=30,
    show_default=True,
    help="In each, every contender runs each component once.",
)
@click.option("--pictures", type=Whole(0, 100_000), default=5, show_default=True, help="Rounds of whole pictures.")
@click.option("--concurrency", default="1,2,4", show_default=True, help="Pictures made at once, or none.")
@click.option(
    "--fresh-starts",
    type=Whole(0, 1000),
    default=5,
    show_default=True,
    help="Processes that load each bundle cold, then cached.",
)
@click.option("--json", "json_path", type=PATH, help="Write all figures and raw samples here.")
@click.option("--html", "html_path", type=PATH, help="Write one page with charts here.")
@click.option("--compare", "old_path", type=PATH, metavar="OLD.json", help="Fail where figures are worse than there.")
@click.option(
    "--tolerance",
    type=Number(0, MILLION),
    default=5.0,
    show_default=True,
    help="Percent that --compare lets pass at least.",
)
@click.pass_context
def bench(
    ctx: click.Context, bundles: Sequence[Path], engines: Sequence[str], threads: int | None, steps: int, rounds: int,
    pictures: int, concurrency: str, fresh_starts: int, json_path: Path | None, html_path: Path | None,
    old_path: Path | None, tolerance: float, calls: CallSchedule,
) -> None:  # fmt: skip
    """Time several bundles in turn within one run.

    A contender is a bundle on an engine. In each round all of them run, in random order, so that ratios hold on a
    machine whose speed drifts; they are printed with their 95 % interval. The first fp32 one is the reference, also
    for the SQNR. All bundles are in memory at once.

    Ctrl-C keeps what is measured: table, --json and --html are still made, exit code 130.

    \b
    Examples:
      qdeploy bench demo/fp32 demo/w8a8
      qdeploy bench demo/fp32 demo/w8a8 --json today.json --html today.html
      qdeploy bench demo/fp32 demo/w8a8 --compare yesterday.json     # exit code 1 when something got worse
      qdeploy bench bundle-openvino --engine openvino --engine ort-openvino --concurrency none

    --compare looks at ratios to the reference where both runs have the same one, whose own times are then only
    shown; else at absolute times, judged only on an equal machine. Worse is what both exceeds the two runs' noise
    and --tolerance; 0.5 dB for SQNR and PSNR, 1 % for the size.
    """
    from qdeploy.artifacts.bundle import open_bundle
    from qdeploy.artifacts.outputs import BENCH_RUN, PAGE
    from qdeploy.base.cpu import explain_slow_weights
    from qdeploy.base.outputs import Output
    from qdeploy.base.progress import show_progress
    from qdeploy.bench.compare import compare_runs
    from qdeploy.bench.measure import run_bench
    from qdeploy.bench.page import build_page
    from qdeploy.bench.report import HOW_TO_READ, build_changes_table, build_latency_table, build_overview_table
    from qdeploy.bench.settings import BenchSettings, levels_from_text, list_contenders
    from qdeploy.bench.store import read_bench_run, write_bench_run
    from qdeploy.reporting.page import check_packages, write_page
    from qdeploy.reporting.tables import print_table
    from qdeploy.runtime.request import check_text

    places = ((json_path, BENCH_RUN, "--json"), (html_path, PAGE, "--html"))
    prepare_outputs(*(Output(path, kind, option) for path, kind, option in places if path is not None))
    settings = BenchSettings(
        steps=steps, rounds=rounds, pictures=pictures, concurrency=levels_from_text(concurrency),
        fresh_starts=fresh_starts, threads=threads, calls=calls,
    )  # fmt: skip
    old = None if old_path is None else read_bench_run(old_path)
    if html_path is not None:
        check_packages()  # before minutes of measuring
    contenders = list_contenders(bundles, engines)
    for contender in contenders:
        manifest = open_bundle(contender.path, verify=False).manifest
        check_text(manifest, settings.prompt if manifest.reads_text else None, calls.text_options)
        note = explain_slow_weights(contender.engine or manifest.engine, manifest.largest_weight_codes)
        if note is not None:
            click.echo(f"{contender.bundle}: {note}", err=True)
    with show_progress(ctx.obj) as on_progress:
        run = run_bench(contenders, settings, on_progress)
    if json_path is not None:
        write_bench_run(json_path, run)
        click.echo(f"wrote {json_path}")
    comparison = None if old is None else compare_runs(old, run, tolerance / 100)
    if html_path is not None:
        write_page(html_path, build_page(run, comparison))
        click.echo(f"wrote {html_path}")
    facts = ("cpu", "gpu", "threads", "integer instructions", "load average at the start")
    about = "; ".join(f"{name}: {run.environment[name]}" for name in facts if name in run.environment)
    click.echo(about)
    print_table(*build_overview_table(run), "overview")
    header, rows = build_latency_table(run)
    if rows:
        print_table(header, rows, "latency", HOW_TO_READ)
    if not run.complete:
        click.echo("interrupted: these are the figures until then", err=True)
        ctx.exit(INTERRUPTED)
    if comparison is not None:
        print_table(*build_changes_table(comparison), f"against {old_path}", "; ".join(comparison.notes))
        comparison.check()
