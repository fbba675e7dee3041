"""Bundles for ncnn of the tiny model and of the built-in one: gates, the table's own integers, audit, pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

import qdeploy
from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.formats.ncnn_files.graph import FLOAT16_TAG, INT8_TAG, iter_weights, name_bin, read_ncnn_graph
from qdeploy.artifacts.formats.ncnn_files.layers import is_integer
from qdeploy.artifacts.table import QuantTable, load_table
from qdeploy.base.errors import ExportError, UsageError
from qdeploy.base.numerics import sqnr_db
from qdeploy.calibrate.dataset_file import load_calibration
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.cli import main
from qdeploy.engines.base import load_engine
from qdeploy.export.audit import audit_graph
from qdeploy.export.exporter import export_bundle
from qdeploy.export.open_dims import OpenDims
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.simulate.simulator import restrict_to_numerics
from qdeploy.targets.base import load_target
from qdeploy.targets.ncnn_files.files import DYNAMIC
from tests.installed import load_or_skip
from tests.shared_artifacts import build_once

NCNN = load_target("ncnn")
COMPONENTS = ("text_encoder", "unet", "vae_decoder")
BENCH = ["--rounds", "1", "--pictures", "1", "--steps", "2", "--concurrency", "none", "--fresh-starts", "0"]
FILES = {"model.ncnn.param", "model.ncnn.bin", "model.ports.json"}
NEAR_DB = 1.5  # that ncnn may be further from the float model than ort-cpu
PICTURES_DB = 15.0  # two roundings of a tiny random model; unrelated pictures are below 5

pytestmark = pytest.mark.exports


@pytest.fixture(autouse=True)
def installed() -> None:
    load_or_skip("ncnn")


def read_codes(path: Path) -> dict[str, NDArray[np.int8]]:
    """The int8 weights in a component's ``.bin`` by layer."""
    graph, data = read_ncnn_graph(path), name_bin(path).read_bytes()
    with name_bin(path).open("rb") as file:
        return {
            stored.layer.name: np.frombuffer(data, np.int8, stored.weight.count, stored.start)
            for stored in iter_weights(graph, file)
            if stored.tag == INT8_TAG
        }


def test_a_bundle_holds_three_files_a_component(int8_ncnn: Path) -> None:
    bundle = open_bundle(int8_ncnn)
    assert bundle.manifest.format == "ncnn"
    for name in COMPONENTS:
        assert {path.name for path in (int8_ncnn / name).iterdir()} == FILES
        assert bundle.manifest.components[name].file == f"{name}/model.ncnn.param"
    unet = bundle.manifest.unet
    assert unet.inputs["timestep"].shape == ()
    assert unet.inputs["sample"].shape[0] == unet.outputs["noise_pred"].shape[0] == 2


def test_it_is_as_far_from_the_float_model_as_ort_cpu(int8_ncnn: Path, int8_bundle: Path) -> None:
    ours, others = (open_bundle(path).manifest.components for path in (int8_ncnn, int8_bundle))
    for name in COMPONENTS:
        assert (ours[name].engine_sqnr_db or 0) > (others[name].engine_sqnr_db or 0) - NEAR_DB
        assert ours[name].parity_engine is None
        assert ours[name].integer_mac_share > 0.85


def test_the_files_hold_the_tables_integers(int8_ncnn: Path, table: QuantTable) -> None:
    """Those of every layer, never rounded again, convolutions and linear layers alike."""
    for name in COMPONENTS:
        quant = restrict_to_numerics(table.components[name], NCNN.numerics)
        codes = read_codes(int8_ncnn / name / "model.ncnn.param")
        assert set(codes) == set(quant.layers)
        for layer, expected in quant.layers.items():
            assert np.array_equal(codes[layer], expected.weight.reshape(-1)), layer
        assert max(np.abs(array.astype(int)).max() for array in codes.values()) == 127


def test_the_audit_names_what_stays_in_float_and_why(int8_ncnn: Path, table: QuantTable) -> None:
    audit = audit_graph(int8_ncnn / "unet" / "model.ncnn.param", "ncnn", files=NCNN.files)
    reasons = {finding.layer: finding.reason for finding in audit.findings if not finding.integer}
    assert {reason for layer, reason in reasons.items() if layer.endswith((".scores", ".values"))} == {DYNAMIC}
    assert reasons["conv_in"] == "float in the graph, by choice"
    integer = {finding.layer: finding.op_type for finding in audit.findings if finding.integer}
    assert set(integer.values()) == {"Convolution int8"}
    audit.check("unet", restrict_to_numerics(table.components["unet"], NCNN.numerics))


def test_the_audit_counts_what_onnx_counts(int8_ncnn: Path, int8_tensorrt: Path) -> None:
    """The same layers, and the same multiply-accumulates of both rows, as in a graph of the same numerics."""
    tensorrt = load_target("tensorrt").files.find_products(int8_tensorrt / "unet" / "model.onnx")
    ours = NCNN.files.find_products(int8_ncnn / "unet" / "model.ncnn.param")
    assert {product.name: product.macs for product in ours} == {product.name: product.macs for product in tensorrt}


def test_a_layer_that_lost_its_codes_fails_the_audit(
    int8_ncnn: Path, table: QuantTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that ran one layer in float would be found."""
    engine = load_engine("ncnn")
    ran = engine.kernels(int8_ncnn / "unet" / "model.ncnn.param", qdeploy.engines.base.EngineOptions())
    lost = next(kernel for kernel in ran if kernel.integer)
    others = [replace(kernel, integer=kernel.integer and kernel is not lost) for kernel in ran]
    monkeypatch.setattr(engine, "kernels", lambda *_: others)
    audit = audit_graph(int8_ncnn / "unet" / "model.ncnn.param", "ncnn", files=NCNN.files)
    with pytest.raises(ExportError, match=f"1 of .* do not run as integer kernels: {lost.names[0]}"):
        audit.check("unet", restrict_to_numerics(table.components["unet"], NCNN.numerics))


def test_it_makes_ort_cpus_picture(int8_ncnn: Path, int8_bundle: Path) -> None:
    pixels = []
    for bundle in (int8_ncnn, int8_bundle):
        with qdeploy.load(bundle, threads=1) as pipe:
            pixels.append(pipe("a red dot", steps=3, seed=1).pixels.astype(np.float32))
    assert sqnr_db(pixels[1], pixels[0]) > PICTURES_DB


def test_its_float_weights_are_in_half_precision(fp16_ncnn: Path, float_bundle: Path) -> None:
    graph = read_ncnn_graph(fp16_ncnn / "unet" / "model.ncnn.param")
    with name_bin(fp16_ncnn / "unet" / "model.ncnn.param").open("rb") as file:
        tagged = [stored.tag for stored in iter_weights(graph, file) if stored.weight.tagged]
    assert set(tagged) == {FLOAT16_TAG}
    sizes = [open_bundle(bundle).component_bytes("unet") for bundle in (fp16_ncnn, float_bundle)]
    assert sizes[0] < 0.6 * sizes[1]
    for info in open_bundle(fp16_ncnn).manifest.components.values():
        assert (info.engine_sqnr_db or 0) > NCNN.parity.float_min_db


def test_a_picture_from_a_picture(fp16_ncnn: Path) -> None:
    with qdeploy.load(fp16_ncnn, threads=1) as pipe:
        first = pipe("a red dot", steps=2, seed=1).images[0]
        second = pipe("a red dot", steps=4, seed=1, image=first, strength=0.5).pixels
    assert second.shape[1:] == np.asarray(first).shape


@build_once("ncnn-w4a8", traces=True)
def w4a8_ncnn(out: Path, tiny_folder: Path, calibration_file: Path) -> None:
    """4 bits, with each skip connection quantized by itself."""
    spec = QuantSpec(weight_bits=4, rewrites=("split_skips",))
    model = load_model(str(tiny_folder))
    export_bundle(model, quantize_model(model, load_calibration(calibration_file), spec), NCNN, out)


def test_four_bits_are_stored_in_eight(w4a8_ncnn: Path, int8_ncnn: Path) -> None:
    """ncnn has no static int8 layer that reads fewer; the codes are those of 4 bits all the same."""
    info = open_bundle(w4a8_ncnn).manifest.components["text_encoder"]
    assert info.weight_bits == (4,)
    codes = read_codes(w4a8_ncnn / "text_encoder" / "model.ncnn.param")
    assert max(np.abs(array.astype(int)).max() for array in codes.values()) <= 8
    sizes = [open_bundle(bundle).component_bytes("text_encoder") for bundle in (w4a8_ncnn, int8_ncnn)]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[1]


@pytest.mark.parametrize(("dims", "words"), [("batch", "files hold one row"), ("size", "sizes stand in its layers")])
def test_open_dimensions_are_refused(tiny_model: LatentDiffusion, tmp_path: Path, dims: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"--target ncnn cannot leave {dims} open: .*{words}"):
        export_bundle(tiny_model, None, NCNN, tmp_path / "b", open_dims=OpenDims.from_text(dims))


def test_a_model_with_an_operation_that_it_lacks_is_refused_by_name(unconditional_folder: Path, tmp_path: Path) -> None:
    """A VQ first stage looks up its codebook by the least distance."""
    with pytest.raises(ExportError, match=r"ncnn cannot compute the operation \w+ \(.+\): .+ for another --target"):
        export_bundle(load_model(str(unconditional_folder)), None, NCNN, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_table_of_timesteps_is_refused_by_name(
    tiny_model: LatentDiffusion, calibration_file: Path, tmp_path: Path
) -> None:
    """It looks rows up by a computed number."""
    spec = QuantSpec(components=("unet",), rewrites=("timestep_table",))
    table = quantize_model(tiny_model, load_calibration(calibration_file), spec)
    with pytest.raises(ExportError, match=r"ncnn cannot compute the operation \w+ \(.+at the module .+\)"):
        export_bundle(tiny_model, table, NCNN, tmp_path / "b")


def test_every_command_takes_the_bundle(int8_ncnn: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    shown = run(main, ["inspect", str(int8_ncnn)])
    assert "ncnn (int8)" in shown.output, shown.output
    shown = run(main, ["inspect", str(int8_ncnn), "--audit", "--threads", "1"])
    assert "Convolution int8" in shown.output, shown.output
    shown = run(main, ["inspect", str(int8_ncnn / "unet" / "model.ncnn.param")])
    assert "encoder_hidden_states" in shown.output, shown.output
    out = tmp_path / "bench.json"
    shown = run(main, ["--quiet", "bench", str(int8_ncnn), "--threads", "1", *BENCH, "--json", str(out)])
    assert shown.exit_code == 0, shown.output


@pytest.mark.slow
def test_the_built_in_model_is_as_near_as_ort_cpus(builtin_table: QuantTable, tmp_path: Path) -> None:
    model = load_model("builtin:emoji")
    bundles = [export_bundle(model, builtin_table, load_target(name), tmp_path / name) for name in ("ncnn", "ort-cpu")]
    for name in COMPONENTS:
        ours, others = (bundle.components[name].engine_sqnr_db or 0 for bundle in bundles)
        print(f"{name}: ncnn {ours:.1f} dB, ort-cpu {others:.1f} dB")
        assert ours > others - NEAR_DB
    with qdeploy.load(tmp_path / "ncnn", threads=1) as pipe:
        assert pipe("a red heart", steps=4, seed=0).pixels.std() > 20


def test_every_integer_layer_is_marked_in_the_param(int8_ncnn: Path, table_file: Path) -> None:
    layers = [layer for layer in read_ncnn_graph(int8_ncnn / "unet" / "model.ncnn.param").layers if is_integer(layer)]
    assert all(layer.get_int(8) == 1 for layer in layers)
    assert len(layers) == len(restrict_to_numerics(load_table(table_file).components["unet"], NCNN.numerics).layers)
