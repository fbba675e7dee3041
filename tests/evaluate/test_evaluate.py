"""Bundles evaluated the whole way: figures, tables, going on, and everything that can be wrong with a reference."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from qdeploy.artifacts.outputs import FEATURES
from qdeploy.artifacts.receipt import hash_path
from qdeploy.base.errors import PictureError, UsageError
from qdeploy.base.outputs import Output, check_output
from qdeploy.base.pictures import FolderPictures, open_picture_set
from qdeploy.cli import main
from qdeploy.evaluate import features
from qdeploy.evaluate.bundles import choose_names
from qdeploy.evaluate.extractors import ExtractorOptions, open_extractor
from qdeploy.evaluate.features import PictureSource, extract_features
from qdeploy.evaluate.references import is_bundle
from qdeploy.evaluate.result import classify_calibration, read_result, write_result
from tests.calibrate.record.test_raw_data import write_lmdb
from tests.hostile.kinds import write_good_result

COUNT = 6
QUICK = ("--extractor", "rgb8", "--count", COUNT, "--steps", 2, "--guidance", 1, "--threads", 1)


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["--quiet", "evaluate", *map(str, arguments)])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\na red house\n")
    return path


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """Twelve pictures in two folders."""
    folder = tmp_path / "reference"
    for number in range(12):
        level = 60 if number % 2 else 190
        pixels = np.random.default_rng(number).normal(level, 30, (16, 16, 3)).clip(0, 255).astype(np.uint8)
        path = folder / ("dark" if number % 2 else "light") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def test_the_whole_way(float_bundle: Path, int8_bundle: Path, reference: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = [float_bundle, int8_bundle, "--reference", reference, "--prompts", prompts, *QUICK, "-o", out]
    metrics = ["--metrics", "fid,kid,is,pr,psnr,ssim,sqnr"]
    shown = evaluate(*asked, *metrics)
    assert shown.exit_code == 0, shown.output
    result = read_result(out / "result.json")
    float_result, int8 = result.contenders
    assert (float_result.bits, float_result.calibration) == ("W32A32", "baseline")
    assert (int8.bits, int8.calibration) == ("W8A8", "W")
    assert float_result.comparison is None
    assert int8.comparison is not None
    assert int8.comparison.numbers == tuple(range(COUNT))
    assert len(int8.comparison.psnr_db) == len(int8.comparison.ssim) == COUNT
    assert len(int8.comparison.step_sqnr_db) == len(int8.comparison.timesteps) >= 2
    assert int8.figures["psnr"] == pytest.approx(
        10 * math.log10(255**2 / np.mean([255**2 / 10 ** (db / 10) for db in int8.comparison.psnr_db]))
    )
    assert int8.comparison.latent_psnr_db is not None
    assert int8.comparison.latent_psnr_db > 20
    assert {"fid", "kid", "is", "precision", "recall", "psnr", "ssim", "sqnr_mean"} <= int8.figures.keys()
    assert result.reference is not None
    assert (result.reference.count, result.reference.size, result.reference.kind) == (12, (16, 16), "folder")
    assert any("rank-deficient" in warning for warning in int8.warnings)
    assert sorted(path.name for path in (out / int8.pictures).iterdir())[-1] == f"{COUNT - 1:06d}.png"
    table = (out / "table.md").read_text()
    for words in (
        "not comparable with published",
        "n = 6",
        "seed 0",
        "12 pictures of 16x16",
        "softmax regression",
        "box",
    ):
        assert words in table
        assert words.split(" ")[0] in shown.output.replace("\n", " ")
    (row, *_) = csv.DictReader(io.StringIO((out / "table.csv").read_text()))
    assert (row["n"], row["extractor"], row["reference_n"], row["seed"]) == ("6", "rgb8", "12", "0")
    calibration = list(csv.DictReader(io.StringIO((out / "calibration.csv").read_text())))
    assert [line["Calib"] for line in calibration] == ["baseline", "W/O", "W"]
    assert calibration[0]["W32A32 FID ↓"] != "-" != calibration[2]["W8A8 FID ↓"]
    assert calibration[1]["W8A8 FID ↓"] == "-"
    write_result(tmp_path / "again.json", result)
    assert read_result(tmp_path / "again.json") == result

    # again: nothing is made anew, and the figures are the same
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    rows = {path: path.read_bytes() for path in out.rglob("*.npy")}
    assert evaluate(*asked, *metrics).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == made
    assert {path: path.read_bytes() for path in out.rglob("*.npy")} == rows
    assert read_result(out / "result.json").contenders == result.contenders


def test_bundles_are_compared_with_a_float_reference(
    float_bundle: Path, int8_bundle: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shown = evaluate(int8_bundle, "--reference", float_bundle, "--prompts", prompts, *QUICK, "-o", out)
    assert shown.exit_code == 0, shown.output
    (int8,) = read_result(out / "result.json").contenders
    assert int8.comparison is not None
    assert int8.comparison.name == float_bundle.name
    assert "same seeds" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metrics", "fid,beauty"], "got 'beauty', expected some of fid,kid"),
        (["--metrics", "fid"], "the metric fid needs --reference"),
        (["--metrics", "sqnr"], "needs a float bundle to compare with"),
        (["--metrics", "is"], "needs a classifier and rgb8 has none"),
        (["--metrics", "clip"], "--clip FOLDER"),
        (["--metrics", "lpips", "--reference", "FLOAT"], "--lpips FILE"),
        (["--metrics", "fid", "--reference", "nowhere"], "nowhere is not a folder"),
        (["--count", "1"], "1 is not in the range 2<=x<=1000000; expected at least 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said(
    options: list[str], words: str, int8_bundle: Path, float_bundle: Path, prompts: Path, tmp_path: Path
) -> None:
    options = [str(float_bundle) if option == "FLOAT" else option for option in options]
    shown = evaluate(int8_bundle, "--prompts", prompts, *QUICK, "-o", tmp_path / "out", *options)
    assert shown.exit_code == 2
    assert words in shown.output.replace("\n", " ")


def test_text_needs_prompts(int8_bundle: Path, tmp_path: Path) -> None:
    shown = evaluate(int8_bundle, "--metrics", "fid", "--reference", tmp_path, *QUICK, "-o", tmp_path / "out")
    assert shown.exit_code == 2
    assert "give --prompts FILE" in shown.output


RGB8 = open_extractor("rgb8", ExtractorOptions())


def source(folder: Path, **options: object) -> PictureSource:
    pictures = open_picture_set(folder)
    return PictureSource("reference", pictures, range(len(pictures)), "one", **options)  # type: ignore[arg-type]


def test_an_empty_reference(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no \.png, .* give a folder of pictures"):
        source(tmp_path)


def test_a_mixed_size_reference(reference: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 16)).save(reference / "dark" / "wide.png")
    with pytest.raises(PictureError, match=r"wide\.png has 20x16 pixels, the first of the set 16x16; --fit .* --skip"):
        extract_features(source(reference), RGB8, tmp_path / "a")
    skipped = extract_features(source(reference), RGB8, tmp_path / "a", skip_broken=True)
    assert (len(skipped), len(skipped.broken)) == (12, 1)
    assert "wide.png" in skipped.broken[0]
    fitted = extract_features(source(reference, fit=(16, 16)), RGB8, tmp_path / "b")
    assert (len(fitted), fitted.broken) == (13, ())


@pytest.mark.parametrize("at", [0, 7, 11])
def test_a_broken_picture_among_many(at: int, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BATCH", 5)
    whole = extract_features(source(reference), RGB8, tmp_path / "whole")
    (broken, *_) = [path for number, path in enumerate(sorted(reference.rglob("*.png"))) if number == at]
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(PictureError, match=rf"{broken.name} cannot be read .*; --skip-broken leaves"):
        extract_features(source(reference), RGB8, tmp_path / "rows")
    extracted = extract_features(source(reference), RGB8, tmp_path / "rows", skip_broken=True)
    assert len(extracted) == 11
    assert np.array_equal(extracted.values, np.delete(whole.values, at, axis=0))
    assert list(extracted.positions) == [number for number in range(12) if number != at]


def test_features_go_on_where_they_were_stopped(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "BATCH", 5)
    monkeypatch.setattr(features, "SAVE_EVERY", 5)
    whole = extract_features(source(reference), RGB8, tmp_path / "whole")

    def stop(what: str, done: int, total: int, note: str = "") -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_features(source(reference), RGB8, tmp_path / "rows", on_progress=stop)
    told: list[int] = []
    extracted = extract_features(
        source(reference), RGB8, tmp_path / "rows", on_progress=lambda what, done, total, note="": told.append(done)
    )
    assert told == [12]
    assert np.array_equal(extracted.values, whole.values)
    other = PictureSource("reference", source(reference).pictures, range(12), "another set")
    extract_features(other, RGB8, tmp_path / "rows", on_progress=lambda what, done, total, note="": told.append(done))
    assert told == [12, 5, 10, 12]


def test_an_lmdb_and_a_folder_of_its_files_have_the_same_features(reference: Path, tmp_path: Path) -> None:
    files = sorted(reference.rglob("*.png"))
    lmdb = write_lmdb(tmp_path / "lsun", {f"{i:040x}".encode(): path.read_bytes() for i, path in enumerate(files)})
    first = extract_features(PictureSource("a", FolderPictures(files), range(12), ""), RGB8, tmp_path)
    second = extract_features(PictureSource("b", open_picture_set(lmdb), range(12), ""), RGB8, tmp_path)
    assert np.array_equal(first.values, second.values)


def test_a_broken_picture_of_a_bundles_own(
    float_bundle: Path, int8_bundle: Path, reference: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = [float_bundle, int8_bundle, "--reference", reference, "--prompts", prompts, *QUICK, "-o", out]
    asked += ["--metrics", "kid,psnr"]
    assert evaluate(*asked).exit_code == 0
    (out / "pictures" / "w8a8" / "000002.png").write_bytes(b"cut")
    shown = evaluate(*asked)
    assert shown.exit_code == 1
    assert "000002.png" in shown.output
    shown = evaluate(*asked, "--skip-broken")
    assert shown.exit_code == 0, shown.output
    _, int8 = read_result(out / "result.json").contenders
    assert (int8.count, len(int8.broken)) == (COUNT - 1, 1)
    assert int8.comparison is not None
    assert int8.comparison.numbers == (0, 1, 3, 4, 5)
    assert "1 broken pictures left out" in shown.output


def test_bundles_are_named_apart() -> None:
    paths = [Path("/runs/a_w8a8/bundle"), Path("/runs/a_w4a8/bundle"), Path("/demo/w8a8")]
    assert choose_names(paths) == ["a_w8a8", "a_w4a8", "w8a8"]
    assert choose_names([Path("/one/w8a8"), Path("/two/w8a8")]) == ["one-w8a8", "two-w8a8"]


def test_calibrations_have_the_experiments_names() -> None:
    from types import SimpleNamespace

    def of(quantization: object) -> str:
        return classify_calibration(SimpleNamespace(provenance={"quantization": quantization}))  # type: ignore[arg-type]

    nearest = {"spec": {"observer": "minmax", "equalize": False, "reconstruction": None}}
    assert of(None) == "baseline"
    assert of(nearest | {"calibration": {"mode": "noise_data"}}) == "W/O"
    assert of(nearest | {"calibration": {"mode": "timestep_aware"}}) == "W"
    assert of({"spec": {"observer": "mse", "equalize": True}, "calibration": {"mode": "noise_data"}}) == "W"


@pytest.mark.parametrize("name", ["inf", "nan", "-inf"])
def test_a_bundle_that_is_called_like_a_number(name: str, tmp_path: Path) -> None:
    write_good_result(tmp_path / "result.json", name)
    (contender,) = read_result(tmp_path / "result.json").contenders
    assert (contender.name, contender.bundle) == (name, name)
    assert contender.comparison is not None
    assert (contender.comparison.name, contender.comparison.psnr_db) == (name, (30.0, math.inf))


def test_a_set_of_hundreds_of_thousands_resumes(tmp_path: Path) -> None:
    """The state says how far and what was left out; names and positions are the set's own."""
    rows = features.RowFile(tmp_path / "set", ["pictures"], (400_000, 1))
    rows.state = features.RowState(rows.state.key, 400_000, (16, 16), [(7, "7.png is broken")])
    rows.save()
    assert (tmp_path / "set.json").stat().st_size < 1000
    assert features.RowFile(tmp_path / "set", ["pictures"], (400_000, 1)).state == rows.state
    check_output(Output(tmp_path / "set.npy", FEATURES))


def test_a_state_that_cannot_be_is_begun_anew(tmp_path: Path) -> None:
    rows = features.RowFile(tmp_path / "set", [], (4, 1))
    for state in (
        features.RowState(rows.state.key, 5, (16, 16)),
        features.RowState(rows.state.key, 2, ()),
        features.RowState(rows.state.key, 1, (16, 16), [(0, "x"), (1, "y")]),
    ):
        rows.state = state
        rows.save()
        assert features.RowFile(tmp_path / "set", [], (4, 1)).read == 0


def test_a_reference_folder_with_a_foreign_manifest_is_one_of_pictures(reference: Path) -> None:
    (reference / "manifest.json").write_text('{"name": "a web data set"}')
    assert not is_bundle(reference)
    assert len(hash_path(reference)) == 64


def test_features_that_were_begun_are_known_as_ours_at_once(tmp_path: Path) -> None:
    """An interruption before the first save would otherwise leave rows without the file that says whose they are."""
    from qdeploy.base.files import read_state
    from qdeploy.evaluate.features import RowFile

    RowFile(tmp_path / "set", ["pictures"], (4, 3))
    assert read_state(tmp_path / "set.json")["read"] == 0
    again = RowFile(tmp_path / "set", ["pictures"], (4, 3))
    again.state.read, again.state.size = 2, (16, 16)
    again.save()
    assert RowFile(tmp_path / "set", ["pictures"], (4, 3)).read == 2
    assert RowFile(tmp_path / "set", ["others"], (4, 3)).read == 0
