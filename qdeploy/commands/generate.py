"""`qdeploy generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qdeploy.commands import (
    CORNER,
    GUIDANCE,
    MILLION,
    PATH,
    PIXELS,
    SCHEDULERS,
    SEED,
    SHARE,
    SIZE,
    SPACED,
    STEPS,
    THREADS,
    Whole,
    add_call_options,
    is_typed,
    prepare_outputs,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from qdeploy.sampling.call_schedule import CallSchedule

MAX_NAMED = 100  # files that are named when they are written


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("prompt", required=False)
@click.option(
    "-o", "--out", type=PATH, default=Path("out.png"), show_default=True, help="Picture; numbered if several."
)
@click.option("--negative", "--negative-prompt", "negative", default="", help="What the picture should not show.")
@click.option("--image", type=PATH, help="Picture to start from; cut and scaled to the bundle's size.")
@click.option("--strength", type=SHARE, help="How far to go from --image, 0 to 1. Default: 0.8, with --mask 1.")
@click.option("--mask", type=PATH, help="Picture as large as --image: white is repainted, black kept.")
@click.option(
    "--width", type=PIXELS, help="Pixels. Default: the bundle's; others need one exported with --dynamic size."
)
@click.option("--height", type=PIXELS, help="The same.")
@click.option(
    "--original-size",
    type=SIZE,
    metavar="HEIGHT,WIDTH",
    help="Stable Diffusion XL: make it look as if scaled from a picture of this size. Default: its own.",
)
@click.option(
    "--crop",
    type=CORNER,
    metavar="TOP,LEFT",
    help="Stable Diffusion XL: make it look as if cut there; 0,0 is centred. Default: 0,0.",
)
@click.option(
    "--target-size",
    type=SIZE,
    metavar="HEIGHT,WIDTH",
    help="Stable Diffusion XL: the size to look like. Default: its own.",
)
@click.option("--engine", help="Default: the one the bundle was exported for.")
@click.option("--threads", type=THREADS, help="Default: all cores.")
@click.option("--low-memory", is_flag=True, help="Load each component only for its stage; slower, least memory.")
@click.option("--steps", type=STEPS, default=25, show_default=True)
@click.option(
    "--guidance", type=GUIDANCE, default=7.5, show_default=True, help="Classifier-free guidance scale; 1 turns it off."
)
@click.option(
    "--guidance-rescale",
    type=SHARE,
    default=0.0,
    show_default=True,
    help="0 to 1: reduces the overexposure of high guidance.",
)
@add_call_options
@click.option("--weighting", is_flag=True, help="Read weights in PROMPT: (red:1.3), [less], \\( for a bracket itself.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--scheduler", help=f"{SCHEDULERS}{SPACED}. Default: the bundle's own.")
@click.option("--eta", type=SHARE, default=0.0, show_default=True, help="ddim's share of noise, 0 to 1.")
@click.option("--count", type=Whole(1, 10 * MILLION), default=1, show_default=True, help="Pictures to make.")
@click.option("--allow-large", is_flag=True, help="Make pictures of more than 4.2 million pixels.")
@click.pass_obj
def generate(
    show: bool, bundle: Path, prompt: str | None, out: Path, negative: str, image: Path | None,
    strength: float | None, mask: Path | None, width: int | None, height: int | None,
    original_size: tuple[int, int] | None, crop: tuple[int, int] | None, target_size: tuple[int, int] | None,
    engine: str | None, threads: int | None, low_memory: bool, steps: int, guidance: float, guidance_rescale: float,
    weighting: bool, seed: int, scheduler: str | None, eta: float, count: int, allow_large: bool,
    calls: CallSchedule,
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
    from qdeploy.artifacts.bundle import open_bundle
    from qdeploy.artifacts.components import SIZES_INPUT
    from qdeploy.base.cpu import explain_slow_weights
    from qdeploy.base.disk import note_kept
    from qdeploy.base.progress import show_progress
    from qdeploy.runtime.advice import advise_request
    from qdeploy.runtime.image import read_pictures
    from qdeploy.runtime.pipeline import load
    from qdeploy.runtime.request import check_text
    from qdeploy.runtime.request_size import build_sizes, resolve_size
    from qdeploy.runtime.results import Step
    from qdeploy.sample.numbered import choose_batch, list_outputs, write_pictures

    text_options = ("guidance", "guidance_interval", "guidance_rescale", "negative", "weighting")
    typed = [f"--{name.replace('_', '-')}" for name in text_options if is_typed(name)]
    opened = open_bundle(bundle, verify=False)
    manifest = opened.manifest
    check_text(manifest, prompt, typed)
    size = resolve_size(width, height, manifest.latents, allow_large=allow_large)
    pixels = size.image_width * size.image_height
    build_sizes(original_size, crop, target_size, size, SIZES_INPUT in manifest.unet.inputs)  # checked before any work
    prepare_outputs(*list_outputs(out, count, pixels))
    picture, mask_picture = read_pictures(image, mask, (size.image_width, size.image_height))
    slow = explain_slow_weights(engine or manifest.engine, manifest.largest_weight_codes)
    hint = advise_request(
        opened, scheduler, None if is_typed("steps") else steps, None if is_typed("guidance") else guidance
    )
    for note in (slow, hint):
        if note is not None:
            click.echo(note, err=True)
    written: list[Path] = []
    batches = -(-count // choose_batch(pixels))
    with (
        note_kept(lambda: f"{len(written)} of {count} pictures are written"),
        load(bundle, engine=engine, threads=threads, low_memory=low_memory) as pipe,
        show_progress(show) as on_progress,
    ):

        def render(numbers: range) -> list[Image]:
            before = numbers.start // choose_batch(pixels)

            def report(step: Step) -> None:
                on_progress("steps", before * step.count + step.index + 1, batches * step.count)

            return pipe(
                prompt, negative_prompt=negative, image=picture, mask=mask_picture, strength=strength, steps=steps,
                guidance_scale=guidance, guidance_rescale=guidance_rescale, weighting=weighting, seed=seed,
                first=numbers.start, count=len(numbers), width=width, height=height,
                original_size=original_size, crop=crop, target_size=target_size, scheduler=scheduler, eta=eta,
                callback=report, allow_large=allow_large, **calls.request_options,
            ).images  # fmt: skip

        for path in write_pictures(render, out, count, pixels):
            written.append(path)
    for path in written[:MAX_NAMED]:
        click.echo(f"wrote {path}")
    if len(written) > MAX_NAMED:
        click.echo(f"wrote {len(written) - MAX_NAMED} more, up to {written[-1]}")
