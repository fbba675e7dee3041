"""`qdeploy generate`."""

from __future__ import annotations

from pathlib import Path

import click

from qdeploy.commands import PATH, is_typed


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("prompt", required=False)
@click.option(
    "-o", "--out", type=PATH, default=Path("out.png"), show_default=True, help="Picture; numbered if several."
)
@click.option("--negative", "--negative-prompt", "negative", default="", help="What the picture should not show.")
@click.option("--image", type=PATH, help="Picture to start from; cut and scaled to the bundle's size.")
@click.option("--strength", type=float, help="How far to go from --image, 0 to 1. Default: 0.8, with --mask 1.")
@click.option("--mask", type=PATH, help="Picture as large as --image: white is repainted, black kept.")
@click.option("--width", type=int, help="Pixels. Default: the bundle's; others need one exported with --dynamic size.")
@click.option("--height", type=int, help="The same.")
@click.option("--engine", help="Default: the one the bundle was exported for.")
@click.option("--threads", type=int, help="Default: all cores.")
@click.option("--low-memory", is_flag=True, help="Load each component only for its stage; slower, least memory.")
@click.option("--steps", default=25, show_default=True)
@click.option("--guidance", default=7.5, show_default=True, help="Classifier-free guidance scale; 1 turns it off.")
@click.option(
    "--guidance-rescale", default=0.0, show_default=True, help="0 to 1: reduces the overexposure of high guidance."
)
@click.option("--weighting", is_flag=True, help="Read weights in PROMPT: (red:1.3), [less], \\( for a bracket itself.")
@click.option("--seed", default=0, show_default=True)
@click.option("--scheduler", help="pndm, ddim, dpm++, euler, euler-a, unipc or lcm. Default: the bundle's own.")
@click.option("--eta", default=0.0, show_default=True, help="ddim's share of noise, 0 to 1.")
@click.option("--count", default=1, show_default=True, help="Pictures to make.")
@click.pass_obj
def generate(
    show: bool, bundle: Path, prompt: str | None, out: Path, negative: str, image: Path | None,
    strength: float | None, mask: Path | None, width: int | None, height: int | None, engine: str | None,
    threads: int | None, low_memory: bool, steps: int, guidance: float, guidance_rescale: float, weighting: bool,
    seed: int, scheduler: str | None, eta: float, count: int,
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
    from qdeploy.base.cpu import explain_slow_weights
    from qdeploy.base.files import stage_file
    from qdeploy.base.progress import show_progress
    from qdeploy.runtime.image import read_pictures
    from qdeploy.runtime.pipeline import load
    from qdeploy.runtime.request import check_text, resolve_size

    text_options = ("guidance", "guidance_rescale", "negative", "weighting")
    typed = [f"--{name.replace('_', '-')}" for name in text_options if is_typed(name)]
    manifest = open_bundle(bundle, verify=False).manifest
    check_text(manifest, prompt, typed)
    size = resolve_size(width, height, manifest.latents)
    picture, mask_picture = read_pictures(image, mask, (size.image_width, size.image_height))
    with (
        load(bundle, engine=engine, threads=threads, low_memory=low_memory) as pipe,
        show_progress(show) as on_progress,
    ):
        result = pipe(
            prompt, negative_prompt=negative, image=picture, mask=mask_picture, strength=strength, steps=steps,
            guidance_scale=guidance, guidance_rescale=guidance_rescale, weighting=weighting, seed=seed, count=count,
            width=width, height=height, scheduler=scheduler, eta=eta,
            callback=lambda step: on_progress("steps", step.index + 1, step.count),
        )  # fmt: skip
    note = explain_slow_weights(engine or manifest.engine, manifest.largest_weight_codes)
    if note is not None:
        click.echo(note, err=True)
    for number, made in enumerate(result.images):
        path = out if count == 1 else out.with_stem(f"{out.stem}-{number}")
        with stage_file(path) as scratch:
            made.save(scratch, format="PNG")
        click.echo(f"wrote {path}")
