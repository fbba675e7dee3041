"""Each output of ours is recognised by its own mark, and by no other's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qdeploy.artifacts import outputs
from qdeploy.artifacts.receipt import RecipeStep, write_receipt
from qdeploy.artifacts.table import QuantTable
from qdeploy.base.encode import save_png
from qdeploy.base.errors import UsageError
from qdeploy.base.outputs import Output, check_output
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.record.qdiffusion import calibration_from_qdiffusion, save_qdiffusion
from qdeploy.inspection.plot import plot_sensitivity
from qdeploy.reporting.page import Page, write_page
from qdeploy.sample.folder import MARKED, remove_stale
from qdeploy.sample.work import STEP_NAME

FILES = {
    "w8a8.safetensors": outputs.TABLE,
    "c.safetensors": outputs.CALIBRATION,
    "set.pt": outputs.QDIFFUSION,
    "own.png": outputs.PICTURE,
    "plot.png": outputs.PLOT,
    "page.html": outputs.PAGE,
}


@pytest.fixture
def made(
    table: QuantTable, table_file: Path, calibration: CalibrationSet, calibration_file: Path, tmp_path: Path
) -> Path:
    """A folder with one output of each kind, as the code that writes them does."""
    shutil.copy(table_file, tmp_path / "w8a8.safetensors")
    shutil.copy(calibration_file, tmp_path / "c.safetensors")
    save_qdiffusion(calibration, tmp_path / "set.pt")
    save_png(Image.fromarray(np.zeros((4, 4, 3), np.uint8)), tmp_path / "own.png")
    unet = table.components["unet"]
    measured = replace(unet, sensitivity_db=dict.fromkeys(unet.layers, 30.0))
    plot_sensitivity(replace(table, components={"unet": measured}), tmp_path / "plot.png")
    write_page(tmp_path / "page.html", Page("Title"))
    return tmp_path


def test_files_are_replaced_by_their_own_kind_only(made: Path) -> None:
    for name, kind in FILES.items():
        for other in set(FILES.values()):
            if other is kind:
                check_output(Output(made / name, other))
                continue
            with pytest.raises(UsageError, match=f"{name} is there already and is not {other.name} of qdeploy"):
                check_output(Output(made / name, other))
    assert len(calibration_from_qdiffusion(made / "set.pt").sample)  # the mark does not disturb its readers


def test_a_cut_file_is_no_longer_known(made: Path) -> None:
    for name in ("w8a8.safetensors", "set.pt"):
        (made / name).write_bytes((made / name).read_bytes()[:40])
        with pytest.raises(UsageError, match="not replaced"):
            check_output(Output(made / name, FILES[name]))


def test_an_empty_file_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()  # of a program that made the name first, such as mktemp
    check_output(Output(tmp_path / "empty", outputs.TABLE))


def test_a_bundle_is_known_by_a_manifest_that_lists_all(float_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(float_bundle, tmp_path / "bundle")
    (copy / ".DS_Store").write_bytes(b"x")  # of a file manager
    check_output(Output(copy, outputs.BUNDLE))
    (copy / "unet" / "model.onnx").unlink()  # broken, and nobody else's
    check_output(Output(copy, outputs.BUNDLE))
    (copy / "unet" / "letter").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="would be deleted"):
        check_output(Output(copy, outputs.BUNDLE))
    (tmp_path / "new").mkdir()
    check_output(Output(tmp_path / "new", outputs.BUNDLE))


def test_broken_and_foreign_torch_files_are_not_ours(made: Path, tmp_path: Path) -> None:
    import torch

    good = (made / "set.pt").read_bytes()
    for place in range(0, len(good), 97):  # cut and changed everywhere: zlib, struct and others raise their own errors
        (tmp_path / "broken.pt").write_bytes(good[:place] + b"\xff\xff" + good[place + 2 :])
        outputs.is_own_qdiffusion(tmp_path / "broken.pt")
        (tmp_path / "broken.pt").write_bytes(good[:place])
        assert not outputs.is_own_qdiffusion(tmp_path / "broken.pt")
    torch.save({"made_by": "somebody else", "xs": [torch.zeros(1)]}, tmp_path / "foreign.pt")
    assert not outputs.is_own_qdiffusion(tmp_path / "foreign.pt")


def test_tables_of_evaluate_are_known_without_its_result(tmp_path: Path) -> None:
    for name, text in {
        "table.md": "|  | fp32 |\n| --- | ---: |\n| bits | W32A32 |\n",
        "table.csv": "bundle,bits,calibration,n,broken,fid\n",
        "calibration.csv": "Calib,W32A32 IS ↑,W32A32 FID ↓\n",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        check_output(Output(tmp_path / name, outputs.EVALUATION_TABLE))
    (tmp_path / "calibration.csv").write_text("layer,scale\n")
    with pytest.raises(UsageError, match=r"calibration\.csv is there already and is not a table of evaluate"):
        check_output(Output(tmp_path / "calibration.csv", outputs.EVALUATION_TABLE))


def test_a_report_of_the_demo_with_any_line_ends(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_bytes(b"# FP32 and W8A8\r\n")
    check_output(Output(tmp_path / "report.md", outputs.DEMO_REPORT))


def test_pictures_of_an_older_receipt_are_believed(tmp_path: Path) -> None:
    """A version before marks wrote both; a newer receipt says that pictures have one."""
    folder, receipts = tmp_path / "pictures", tmp_path / "receipts"
    old, new = (RecipeStep(STEP_NAME, folder, {"steps": steps}, {}) for steps in (1, 2))
    for more, refused in ((None, False), (MARKED, True)):
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / "000000.png")
        write_receipt(receipts, old, more=more)
        if refused:
            with pytest.raises(UsageError, match="holds pictures that qdeploy did not make"):
                remove_stale(new, receipts)
        else:
            remove_stale(new, receipts)
        assert (folder / "000000.png").exists() == refused
