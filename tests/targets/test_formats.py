"""A target whose graphs are not ONNX: a file for the format, one for the target, one for the engine, no other edit."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import qdeploy
import qdeploy.artifacts.formats
import qdeploy.engines
import qdeploy.targets
from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.graph_format import find_format, list_formats, load_format
from qdeploy.artifacts.table import QuantTable
from qdeploy.base.errors import BundleError, UsageError
from qdeploy.cli import main
from qdeploy.export.exporter import export_bundle
from qdeploy.inspection.audit import describe_audit
from qdeploy.models.source import LatentDiffusion
from qdeploy.targets.base import list_targets, load_graph_files, load_target
from tests.artifacts.test_bundle import edit, relist

MAGIC = b"abacus\n"
FORMAT = """
from qdeploy.artifacts.formats.onnx import read_graph_file
from qdeploy.artifacts.graph_format import GraphFile, GraphFormat

def read(path, max_bytes):
    if path.read_bytes() != b"abacus\\n":
        raise ValueError("it does not begin with abacus")
    graph = read_graph_file(path.with_suffix(".beads"), max_bytes)
    return GraphFile(graph.inputs, graph.outputs, frozenset({path.with_suffix(".beads").name, *graph.external_files}))

FORMAT = GraphFormat("abacus", "abacus graph", "model.abacus", 2**20, read)
"""
TARGET = """
from dataclasses import replace
from qdeploy.targets.base import GraphFiles, ONNX_FILES
from qdeploy.targets.openvino import TARGET as OPENVINO

def write(graph, path):
    path.write_bytes(b"abacus\\n")
    ONNX_FILES.write(graph, path.with_suffix(".beads"))

def find_products(path):
    return ONNX_FILES.find_products(path.with_suffix(".beads"))

def read_example(path):
    return ONNX_FILES.read_example(path.with_suffix(".beads"))

TARGET = replace(
    OPENVINO, name="abacus", engine="abacus", files=GraphFiles("abacus", write, find_products, read_example)
)
"""
ENGINE = """
from qdeploy.engines import openvino
from qdeploy.engines.openvino import versions

def open_session(path, options):
    assert path.read_bytes() == b"abacus\\n"
    return openvino.open_session(path.with_suffix(".beads"), options)

def kernels(path, options, feeds=None):
    return openvino.kernels(path.with_suffix(".beads"), options, feeds)
"""
PARTS = {qdeploy.artifacts.formats: FORMAT, qdeploy.targets: TARGET, qdeploy.engines: ENGINE}


@pytest.fixture(autouse=True)
def abacus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("openvino", reason="openvino is not installed")
    for package, code in PARTS.items():
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / "abacus.py").write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    yield
    for package in PARTS:
        sys.modules.pop(f"{package.__name__}.abacus", None)


@pytest.fixture
def bundle(tiny_model: LatentDiffusion, table: QuantTable, tmp_path: Path) -> Path:
    export_bundle(tiny_model, table, load_target("abacus"), tmp_path / "bundle")
    return tmp_path / "bundle"


def test_it_is_found_by_its_files() -> None:
    assert {"abacus", "onnx"} <= set(list_formats())
    assert load_graph_files("abacus") is load_target("abacus").files
    found = find_format(Path("unet/model.abacus"))
    assert found is not None
    assert found.name == "abacus"
    assert find_format(Path("unet/model.abacus.txt")) is None
    for name in list_targets():
        load_format(load_target(name).files.format)


@pytest.mark.exports
def test_it_is_exported_gated_opened_run_and_audited(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert manifest.format == "abacus"
    assert manifest.unet.file == "unet/model.abacus"
    assert (manifest.unet.parity_db or 0) > 0
    assert manifest.unet.integer_mac_share > 0.5
    with qdeploy.load(bundle) as pipe:
        picture = np.asarray(pipe("a red dot", steps=2, seed=0).images[0])
    assert picture.std() > 0
    shares = [value for label, value in describe_audit(bundle) if label == "unet"]
    assert shares == [f"{manifest.unet.integer_mac_share:.1%} of MACs in integers"]
    shown = CliRunner().invoke(main, ["inspect", str(bundle / "unet" / "model.abacus")])
    assert "model.beads" in shown.output, shown.output


@pytest.mark.exports
def test_a_broken_or_unknown_one_is_refused(bundle: Path) -> None:
    beads = bundle / "unet" / "model.beads"
    whole = beads.read_bytes()
    beads.write_bytes(whole[:-100] + bytes(100))
    with pytest.raises(BundleError, match="SHA-256 is not the manifest's"):
        open_bundle(bundle)
    beads.write_bytes(whole)
    (bundle / "unet" / "model.abacus").write_bytes(b"slide rule\n")
    relist(bundle, "unet/model.abacus")
    with pytest.raises(BundleError, match=r"unet/model\.abacus is not a readable abacus graph \(it does not begin"):
        open_bundle(bundle)
    (bundle / "unet" / "model.abacus").write_bytes(MAGIC)
    relist(bundle, "unet/model.abacus")
    edit(bundle, lambda d: d.update(files=[entry for entry in d["files"] if entry["path"] != "unet/model.beads.data"]))
    beads.with_name("model.beads.data").unlink()
    with pytest.raises(BundleError, match=r"reads weights from 'model\.beads\.data', which the manifest does not list"):
        open_bundle(bundle)
    edit(bundle, lambda d: d.update(format="punched cards"))
    with pytest.raises(BundleError, match="unknown graph format 'punched cards'; known: abacus"):
        open_bundle(bundle)


def test_a_format_that_no_target_writes_is_named() -> None:
    with pytest.raises(UsageError, match="no target writes graphs as 'punched cards'"):
        load_graph_files("punched cards")


@pytest.mark.exports
def test_a_bundle_from_before_formats_is_onnx(int8_bundle: Path, tmp_path: Path) -> None:
    old = shutil.copytree(int8_bundle, tmp_path / "old")
    edit(old, lambda d: d.pop("format"))
    assert open_bundle(old).manifest.format == "onnx"
