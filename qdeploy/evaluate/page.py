"""An evaluation as one HTML page: figures, pictures side by side, curves, layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qdeploy.base.decode import decode_picture
from qdeploy.base.errors import PictureError
from qdeploy.evaluate.bundles import PICTURES
from qdeploy.evaluate.charts import RESULT_CHARTS, draw_histograms, draw_layers
from qdeploy.evaluate.layer_figures import BundleLayers, LayerFigures
from qdeploy.evaluate.report import build_calibration_table, build_table, list_notes
from qdeploy.evaluate.result import BundleResult, EvaluationResult
from qdeploy.reporting.page import Facts, Page, Picture, PictureGrid, Section, Table, Text
from qdeploy.reporting.picture_grid import amplify_difference
from qdeploy.sample.folder import picture_path

PICTURES_SHOWN = 8  # pictures of each bundle
MAX_PIXELS = 160  # a side, of what is embedded
GAIN = 4  # of difference maps
HISTOGRAM_LAYERS, TABLE_LAYERS = 4, 12  # layers with histograms, and in the table
LAYERS_TITLE = "Layer by layer"
LAYERS_NOTE = (
    "What a layer of the float model reads, on the first input that the table recorded, is given to the quantized "
    "layer too. Weights are in the model's own units, equalization undone."
)
NO_TABLES_NOTE = (
    "Left out. With --table TABLE, for each table that a bundle was made from, the SQNR of its layers and histograms "
    "of the worst are measured on the float model."
)
Pixels = NDArray[np.uint8]


def build_page(result: EvaluationResult, out: Path, layers: Sequence[BundleLayers] = ()) -> Page:
    """The page; ``out`` is the evaluation's folder, whose pictures are shown."""
    tables = [Table(*table) for table in (build_table(result), build_calibration_table([result])) if table is not None]
    sections = [Section("Figures", [*tables, Text(build_notes(result))])]
    sections.append(Section("The same seeds side by side", [build_picture_grid(result, out)]))
    sections += [Section(chart.alt, [chart]) for make in RESULT_CHARTS if (chart := make(result)) is not None]
    sections += build_layer_sections(layers, result)
    sections.append(Section("Measured on", [Facts(result.environment), Facts(list_settings(result))]))
    hashes = [
        (contender.name, str(contender.provenance.get("model_sha256", ""))[:16], contender.bundle_sha256[:16])
        for contender in result.contenders
    ]
    sections.append(Section("Bundles", [Table(("", "model, SHA-256", "bundle, SHA-256"), hashes)]))
    title = "Evaluation: " + ", ".join(contender.name for contender in result.contenders)
    return Page(title, summarize(result), sections, f"qdeploy {result.environment.get('qdeploy', '')}")


def build_notes(result: EvaluationResult) -> list[str]:
    """The notes of every table as one paragraph, and each warning with the bundles that it concerns as another."""
    warning_notes = {
        f"{contender.name}: {warning}": (warning, contender.name)
        for contender in result.contenders
        for warning in contender.warnings
    }
    names_by_warning: dict[str, list[str]] = {}
    for warning, name in warning_notes.values():
        names_by_warning.setdefault(warning, []).append(name)
    shared_notes = "; ".join(note for note in list_notes(result) if note not in warning_notes)
    return [f"{shared_notes}.", *(f"{warning} ({', '.join(names)})." for warning, names in names_by_warning.items())]


def summarize(result: EvaluationResult) -> str:
    """How far each bundle is from its reference."""
    parts = [
        f"{contender.name} {contender.figures['psnr']:.1f} dB"
        for contender in result.contenders
        if contender.comparison is not None and contender.figures.get("psnr") is not None
    ]
    references = " and ".join(
        dict.fromkeys(contender.comparison.name for contender in result.contenders if contender.comparison is not None)
    )
    return f"PSNR of the pictures compared with {references}'s of the same seeds: {', '.join(parts)}." if parts else ""


def build_picture_grid(result: EvaluationResult, out: Path) -> PictureGrid:
    """The first numbers in rows, the reference and every bundle in columns, below each compared one its difference."""
    compared = [contender for contender in result.contenders if contender.comparison is not None]
    references = dict.fromkeys(contender.comparison.name for contender in compared if contender.comparison is not None)
    names = list(dict.fromkeys([*references, *(contender.name for contender in result.contenders)]))
    by_name = {contender.name: contender for contender in result.contenders}
    rows = [
        (format_row_name(result, number), [build_cell(out, name, by_name.get(name), number) for name in names])
        for number in range(min(PICTURES_SHOWN, int(result.settings["count"])))
    ]
    caption = f"Pictures scaled down to {MAX_PIXELS} pixels at most."
    if compared:
        caption += (
            f" Below each: the absolute difference to {' and '.join(references)} at full size, {GAIN} times amplified."
        )
    return PictureGrid(("", *names), rows, caption)


def format_row_name(result: EvaluationResult, number: int) -> str:
    """The picture's number and, where there is one, its prompt."""
    prompts = result.settings["prompts"]
    return f"{number} {prompts[number % len(prompts)]}" if prompts else str(number)


def build_cell(out: Path, name: str, contender: BundleResult | None, number: int) -> list[Picture]:
    """A bundle's picture and its difference map; nothing for one that cannot be read."""
    pixels = read_pixels(out / PICTURES / name, number)
    if pixels is None:
        return []
    pictures = [Picture(shrink_picture(pixels), f"picture {number} of {name}")]
    comparison = None if contender is None or contender.comparison is None else contender.comparison
    reference_pixels = None if comparison is None else read_pixels(out / PICTURES / comparison.name, number)
    if comparison is None or reference_pixels is None:
        return pictures
    amplified = amplify_difference(pixels, reference_pixels, GAIN)
    psnr = dict(zip(comparison.numbers, comparison.psnr_db, strict=False)).get(number)
    caption = "" if psnr is None else f"{psnr:.1f} dB"
    return [
        *pictures,
        Picture(shrink_picture(amplified), f"difference of {name} to {comparison.name} in picture {number}", caption),
    ]


def read_pixels(folder: Path, number: int) -> Pixels | None:
    """``uint8[H, W, 3]``, or None for a file that cannot be read, which the notes count."""
    path = picture_path(folder, number)
    try:
        return np.asarray(decode_picture(path.read_bytes(), str(path)))
    except (OSError, PictureError):
        return None


def shrink_picture(pixels: Pixels) -> Image.Image:
    """The picture, its longer side MAX_PIXELS at most."""
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_PIXELS, MAX_PIXELS), Image.Resampling.BOX)
    return image


def build_layer_sections(layers: Sequence[BundleLayers], result: EvaluationResult) -> list[Section]:
    """All layers as dots; the worst of each bundle in a table and as histograms."""
    if not layers:
        return [Section(LAYERS_TITLE, lead=NO_TABLES_NOTE)]
    sections = [Section(LAYERS_TITLE, draw_layers(layers, result), LAYERS_NOTE)]
    header = ("", "component", "bits", "weight, dB", "input, dB", "output, dB")
    for bundle_layers in layers:
        rows = [format_layer_row(figures) for figures in bundle_layers.worst(TABLE_LAYERS)]
        caption = f"SQNR of weight, input and output; the {len(rows)} least of {len(bundle_layers.figures)} layers."
        chart = draw_histograms(bundle_layers.bundle, bundle_layers.worst(HISTOGRAM_LAYERS))
        sections.append(Section(f"The worst layers of {bundle_layers.bundle}", [Table(header, rows, caption), chart]))
    return sections


def format_layer_row(layer: LayerFigures) -> tuple[str, ...]:
    """Name, component, widths such as W8A8, and the SQNR in dB of weight, input and output."""
    decibels = (f"{value:.1f}" for value in (layer.weight_db, layer.input_db, layer.output_db))
    return (layer.name, layer.component, f"W{layer.weight_bits}A{layer.act_bits}", *decibels)


def list_settings(result: EvaluationResult) -> dict[str, str]:
    """The settings, without those that were not given."""
    settings = result.settings
    names = (
        "count",
        "seed",
        "steps",
        "scheduler",
        "guidance_scale",
        "calls",
        "reference_count",
        "fit",
        "extractor",
        "engine",
        "threads",
    )
    shown = {name: str(settings[name]) for name in names if settings.get(name) not in (None, False, "")}
    return {"metrics": ", ".join(settings["metrics"]), **shown}
