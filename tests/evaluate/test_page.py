"""The page of an evaluation: what it holds, how a browser shows it, and the layers compared with the float model's."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from qdeploy.artifacts.table import QuantTable, save_table
from qdeploy.base.errors import TableError, UsageError
from qdeploy.base.numerics import sqnr_db
from qdeploy.cli import main
from qdeploy.evaluate.layer_figures import BundleLayers, match_tables
from qdeploy.evaluate.layers import check_models, measure_layers
from qdeploy.evaluate.page import build_page
from qdeploy.evaluate.result import read_result
from qdeploy.evaluate.timing import read_seconds_per_picture, record_time
from qdeploy.reporting.page import Picture, PictureGrid, write_page
from tests.reporting.test_page import HOSTILE, Read, browse, needs_browser, screenshot
from tests.shared_artifacts import build_once

COUNT = 4
SIDE = 144  # pixels of a shown picture, 9 rem
MAGENTA, CYAN, YELLOW = (255, 0, 255), (0, 255, 255), (255, 255, 0)


@build_once("evaluated", traces=True)
def evaluation_folder(out: Path, float_bundle: Path, int8_bundle: Path, table_file: Path) -> None:
    """The folder of an evaluation with its page, one prompt of which would like to be a script."""
    out.mkdir()
    (out / "prompts.txt").write_text(f"a cat\n{HOSTILE}\n")
    asked = [float_bundle, int8_bundle, "--reference", float_bundle, "--prompts", out / "prompts.txt", "--count", COUNT]
    asked += ["--metrics", "fid,psnr,ssim,sqnr", "--extractor", "rgb8", "--steps", 3, "--threads", 1, "-o", out]
    asked += ["--html", out / "page.html", "--table", table_file]
    shown = CliRunner().invoke(main, ["--quiet", "evaluate", *map(str, asked)])
    assert shown.exit_code == 0, shown.output
    assert "page.html" in shown.output


def test_a_page_holds_everything(evaluation_folder: Path) -> None:
    html = (evaluation_folder / "page.html").read_text()
    read = Read(html)
    text = " ".join(read.text)
    for words in (
        "PSNR to the float reference", "n = 4 pictures", "rgb8", "not comparable with published", "seed 0",
        "side by side",
        "4 times amplified", "at each step", "Size, speed and quality", "longer a picture took",
        "SQNR of each layer's output", "The worst layers of w8a8", "before", "after", "Measured on",
    ):  # fmt: skip
        assert words in text, words
    result = read_result(evaluation_folder / "result.json")
    assert all(one.seconds_per_picture and one.size_bytes for one in result.contenders)
    assert read.tags.count("img") == COUNT * 3  # the reference's, the other's, and their difference


def test_a_page_is_escaped_and_fetches_nothing(evaluation_folder: Path) -> None:
    html = (evaluation_folder / "page.html").read_text()
    read = Read(html)
    assert any(HOSTILE in text for text in read.text)
    assert not {"script", "iframe", "link", "object"} & set(read.tags)
    targets = [value for _, name, value in read.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    assert set(re.findall(r"url\((.)", html)) == {"#"}


def test_without_tables_a_page_says_how_to_get_the_layers(evaluation_folder: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", build_page(read_result(evaluation_folder / "result.json"), evaluation_folder))
    text = (tmp_path / "page.html").read_text()
    assert "--table TABLE" in text
    assert "worst layers" not in text


def write_painted_page(evaluation_folder: Path, out: Path) -> None:
    """A page whose float pictures are magenta and whose others are cyan."""
    result = read_result(evaluation_folder / "result.json")
    for one, colour in zip(result.contenders, (MAGENTA, CYAN), strict=True):
        for number in range(COUNT):
            path = out / one.pictures / f"{number:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (200, 200), colour).save(path)
    write_page(out / "page.html", build_page(result, out))


def test_pictures_are_embedded_small_and_differences_amplified(evaluation_folder: Path, tmp_path: Path) -> None:
    write_painted_page(evaluation_folder, tmp_path)
    page = build_page(read_result(evaluation_folder / "result.json"), tmp_path)
    (grid,) = [block for section in page.sections for block in section.blocks if isinstance(block, PictureGrid)]
    for name, (first, second) in grid.rows:
        assert [picture.image.getpixel((5, 5)) for picture in (*first, *second)] == [MAGENTA, CYAN, YELLOW], name
        assert all(isinstance(picture, Picture) and picture.image.width == 160 for picture in (*first, *second))
    Image.new("RGB", (200, 200), (245, 10, 255)).save(tmp_path / "pictures" / "w8a8" / "000000.png")
    page = build_page(read_result(evaluation_folder / "result.json"), tmp_path)
    (grid,) = [block for section in page.sections for block in section.blocks if isinstance(block, PictureGrid)]
    assert grid.rows[0][1][1][1].image.getpixel((5, 5)) == (40, 40, 0)


@needs_browser
def test_a_browser_shows_the_pictures_side_by_side(evaluation_folder: Path, tmp_path: Path) -> None:
    write_painted_page(evaluation_folder, tmp_path)
    dom = browse(tmp_path / "page.html", "--dump-dom")
    assert dom.count("<img") == COUNT * 3
    pixels = np.asarray(screenshot(tmp_path / "page.html", size=(1200, 5000), mode="RGB"))
    corners = {}
    for colour in (MAGENTA, CYAN, YELLOW):
        rows, columns = np.nonzero((pixels == colour).all(axis=2))
        assert len(rows) >= 0.98 * COUNT * SIDE**2  # but for rounded corners
        corners[colour] = (rows.min(), columns.min())
    assert corners[MAGENTA][0] == corners[CYAN][0]
    assert corners[MAGENTA][1] + SIDE <= corners[CYAN][1]
    assert corners[YELLOW][1] == corners[CYAN][1]
    assert corners[YELLOW][0] >= corners[CYAN][0] + SIDE


@needs_browser
def test_a_browser_draws_the_charts(evaluation_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_bytes((evaluation_folder / "page.html").read_bytes())
    dom = browse(tmp_path / "page.html", "--dump-dom")
    assert dom.count("<svg") == len(re.findall("<svg", (tmp_path / "page.html").read_text())) >= 4
    pixels = np.asarray(screenshot(tmp_path / "page.html", size=(1200, 8000), mode="RGB"))
    assert (pixels == (0xEE, 0x88, 0x66)).all(axis=2).sum() > 500  # the tested bundle's colour


def measure_table_layers(table: QuantTable, path: Path, bundle: Path) -> BundleLayers:
    save_table(table, path)
    (layers,) = measure_layers(match_tables([f"{bundle}={path}"], [bundle]), ["it"])
    return layers


def test_layers_are_held_against_the_float_model(table: QuantTable, int8_bundle: Path, tmp_path: Path) -> None:
    layers = measure_table_layers(table, tmp_path / "t.safetensors", int8_bundle)
    assert {(one.component, one.name) for one in layers.figures} == {
        (component, name) for component, quant in table.components.items() for name in quant.layers
    }
    assert all(15 < one.output_db < 80 and one.weight_db > 20 for one in layers.figures)
    for one in layers.figures:
        assert one.weight.before.sum() == one.weight.after.sum() > 0
        assert one.input.before.sum() == one.input.after.sum() > 0


def test_a_spoilt_layer_is_the_worst(table: QuantTable, int8_bundle: Path, tmp_path: Path) -> None:
    unet = table.components["unet"]
    name = sorted(unet.layers)[3]
    layer = unet.layers[name]
    spoilt = replace(unet, layers={**unet.layers, name: replace(layer, weight_scale=layer.weight_scale * 2)})
    spoilt_table = replace(table, components={**table.components, "unet": spoilt})
    worst = measure_table_layers(spoilt_table, tmp_path / "t.safetensors", int8_bundle).worst(1)[0]
    assert worst.name == name
    assert worst.weight_db == pytest.approx(sqnr_db(np.ones(1), np.full(1, 2.0)), abs=0.2)


def test_tables_find_their_bundles(
    table: QuantTable, table_file: Path, float_bundle: Path, int8_bundle: Path, tmp_path: Path
) -> None:
    bundles = [float_bundle, int8_bundle]
    assert [one.number for one in match_tables([str(table_file)], bundles)] == [1]
    assert [one.number for one in match_tables([f"{int8_bundle}={table_file}"], bundles)] == [1]
    other = tmp_path / "other=table.safetensors"
    save_table(replace(table, provenance={**table.provenance, "spec": "another"}), other)
    with pytest.raises(UsageError, match="no bundle given says"):
        match_tables([str(other)], bundles)
    save_table(replace(table, model_sha256="0" * 64), other)
    with pytest.raises(TableError, match="other weights"):
        check_models(match_tables([f"{int8_bundle}={other}"], bundles))


def test_a_table_needs_a_page(int8_bundle: Path, table_file: Path, tmp_path: Path) -> None:
    asked = ["--quiet", "evaluate", int8_bundle, "--table", table_file, "-o", tmp_path / "out"]
    shown = CliRunner().invoke(main, list(map(str, asked)))
    assert isinstance(shown.exception, UsageError) or "--table goes with --html" in shown.output
    assert not (tmp_path / "out").exists()


def test_seconds_are_kept_over_runs_and_interruptions(tmp_path: Path) -> None:
    pictures, receipts = tmp_path / "pictures", tmp_path / "receipts"
    pictures.mkdir()
    receipts.mkdir()
    (receipts / "sample.json").write_text('{"key": "a"}')
    assert read_seconds_per_picture(receipts) is None

    def make(number: int) -> None:
        (pictures / f"{number:06d}.png").touch()

    with record_time(pictures, receipts):
        make(0)
    first = (receipts / "timing.json").read_text()
    with record_time(pictures, receipts):
        pass
    assert (receipts / "timing.json").read_text() == first  # a run that makes nothing changes nothing
    with pytest.raises(KeyboardInterrupt), record_time(pictures, receipts):
        make(1)
        raise KeyboardInterrupt
    assert '"pictures": 2' in (receipts / "timing.json").read_text()
    (receipts / "sample.json").write_text('{"key": "b"}')
    assert read_seconds_per_picture(receipts) is None  # pictures made another way
