"""An evaluation as one HTML page to look at: figures, pictures side by side, curves, layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qdeploy.errors import PictureError
from qdeploy.evaluate.charts import MAKERS, histograms, layer_dots
from qdeploy.evaluate.contenders import PICTURES
from qdeploy.evaluate.layer_figures import LayerFigures, Layers
from qdeploy.evaluate.report import calibration_table, notes_under, table_of
from qdeploy.evaluate.result import Contender, Result
from qdeploy.page import Facts, Grid, Page, Picture, Section, Table, Text
from qdeploy.picture_files import decode
from qdeploy.picture_grid import amplified_difference
from qdeploy.sample.folder import picture_file

SHOWN = 8  # pictures of each bundle
MOST_PIXELS = 160  # a side, of what is embedded
GAIN = 4  # of difference maps
WORST, LISTED = 4, 12  # layers with histograms, and in the table
LAYERS = "Layer by layer"
HOW = (
    "What a layer of the float model reads, on the first input that the table recorded, is given to the quantized "
    "layer too. Weights are in the model's own units, equalization undone."
)
WITHOUT_TABLES = (
    "Left out. With --table TABLE, for each table that a bundle was made from, the SQNR of its layers and histograms "
    "of the worst are measured on the float model."
)
Pixels = NDArray[np.uint8]


def page_of(result: Result, out: Path, layers: Sequence[Layers] = ()) -> Page:
    """The page; ``out`` is the evaluation's folder, whose pictures are shown."""
    tables = [Table(*table) for table in (table_of(result), calibration_table([result])) if table is not None]
    sections = [Section("Figures", [*tables, Text(notes_of(result))])]
    sections.append(Section("The same seeds side by side", [side_by_side(result, out)]))
    sections += [Section(chart.alt, [chart]) for make in MAKERS if (chart := make(result)) is not None]
    sections += layer_sections(layers, result)
    sections.append(Section("Measured on", [Facts(result.environment), Facts(settings_facts(result))]))
    hashes = [
        (one.name, str(one.provenance.get("model_sha256", ""))[:16], one.bundle_sha256[:16])
        for one in result.contenders
    ]
    sections.append(Section("Whose pictures these are", [Table(("", "model, SHA-256", "bundle, SHA-256"), hashes)]))
    title = "Evaluation: " + ", ".join(one.name for one in result.contenders)
    return Page(title, in_a_sentence(result), sections, f"qdeploy {result.environment.get('qdeploy', '')}")


def notes_of(result: Result) -> list[str]:
    """What stands under every table as one paragraph, and each warning with all whom it concerns as another."""
    warned = {f"{one.name}: {warning}": (warning, one.name) for one in result.contenders for warning in one.warnings}
    concerned: dict[str, list[str]] = {}
    for warning, name in warned.values():
        concerned.setdefault(warning, []).append(name)
    plain = "; ".join(note for note in notes_under(result) if note not in warned)
    return [f"{plain}.", *(f"{warning} ({', '.join(names)})." for warning, names in concerned.items())]


def in_a_sentence(result: Result) -> str:
    """How far each bundle is from its twin."""
    parts = [
        f"{one.name} {one.figures['psnr']:.1f} dB"
        for one in result.contenders
        if one.twin is not None and one.figures.get("psnr") is not None
    ]
    twins = " and ".join(dict.fromkeys(one.twin.name for one in result.contenders if one.twin is not None))
    return f"PSNR of the pictures beside {twins}'s of the same seeds: {', '.join(parts)}." if parts else ""


def side_by_side(result: Result, out: Path) -> Grid:
    """The first numbers down, the twin and every bundle across, below each tested one how it differs."""
    tested = [one for one in result.contenders if one.twin is not None]
    twins = dict.fromkeys(one.twin.name for one in tested if one.twin is not None)
    names = list(dict.fromkeys([*twins, *(one.name for one in result.contenders)]))
    by_name = {one.name: one for one in result.contenders}
    rows = [
        (row_name(result, number), [cell(out, name, by_name.get(name), number) for name in names])
        for number in range(min(SHOWN, int(result.settings["count"])))
    ]
    caption = f"Pictures scaled down to {MOST_PIXELS} pixels at most."
    if tested:
        caption += (
            f" Below each: the absolute difference to {' and '.join(twins)} at full size, {GAIN} times amplified."
        )
    return Grid(("", *names), rows, caption)


def row_name(result: Result, number: int) -> str:
    """The picture's number and, where there is one, its prompt."""
    prompts = result.settings["prompts"]
    return f"{number} {prompts[number % len(prompts)]}" if prompts else str(number)


def cell(out: Path, name: str, one: Contender | None, number: int) -> list[Picture]:
    """A bundle's picture and its difference map; nothing for one that cannot be read."""
    pixels = pixels_of(out / PICTURES / name, number)
    if pixels is None:
        return []
    shown = [Picture(reduced(pixels), f"picture {number} of {name}")]
    beside = None if one is None or one.twin is None else one.twin
    twin = None if beside is None else pixels_of(out / PICTURES / beside.name, number)
    if beside is None or twin is None:
        return shown
    amplified = amplified_difference(pixels, twin, GAIN)
    psnr = dict(zip(beside.numbers, beside.psnr_db, strict=False)).get(number)
    said = "" if psnr is None else f"{psnr:.1f} dB"
    return [*shown, Picture(reduced(amplified), f"difference of {name} to {beside.name} in picture {number}", said)]


def pixels_of(folder: Path, number: int) -> Pixels | None:
    """``uint8[H, W, 3]``, or None for a file that cannot be read, which the notes count."""
    path = picture_file(folder, number)
    try:
        return np.asarray(decode(path.read_bytes(), str(path)))
    except (OSError, PictureError):
        return None


def reduced(pixels: Pixels) -> Image.Image:
    """The picture, its longer side MOST_PIXELS at most."""
    image = Image.fromarray(pixels)
    image.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.BOX)
    return image


def layer_sections(layers: Sequence[Layers], result: Result) -> list[Section]:
    """All layers as dots; the worst of each bundle in a table and as histograms."""
    if not layers:
        return [Section(LAYERS, lead=WITHOUT_TABLES)]
    sections = [Section(LAYERS, layer_dots(layers, result), HOW)]
    header = ("", "component", "bits", "weight, dB", "input, dB", "output, dB")
    for one in layers:
        rows = [layer_row(figures) for figures in one.worst(LISTED)]
        caption = f"SQNR of weight, input and output; the {len(rows)} least of {len(one.figures)} layers."
        drawn = histograms(one.bundle, one.worst(WORST))
        sections.append(Section(f"The worst layers of {one.bundle}", [Table(header, rows, caption), drawn]))
    return sections


def layer_row(one: LayerFigures) -> tuple[str, ...]:
    decibels = (f"{value:.1f}" for value in (one.weight_db, one.input_db, one.output_db))
    return (one.name, one.component, f"W{one.weight_bits}A{one.act_bits}", *decibels)


def settings_facts(result: Result) -> dict[str, str]:
    """What was asked, without what was not."""
    asked = result.settings
    plain = (
        "count",
        "seed",
        "steps",
        "scheduler",
        "guidance",
        "reference_count",
        "fit",
        "extractor",
        "engine",
        "threads",
    )
    shown = {name: str(asked[name]) for name in plain if asked.get(name) not in (None, False, "")}
    return {"metrics": ", ".join(asked["metrics"]), **shown}
