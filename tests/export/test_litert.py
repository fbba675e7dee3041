"""Bundles for LiteRT of the tiny model and of the built-in one: gates, the table's own integers, audit, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

import qdeploy
from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.formats.tflite_files.file import get_shape, read_tflite
from qdeploy.artifacts.formats.tflite_files.schema import PRODUCTS, TYPES, Model, Op
from qdeploy.artifacts.table import QuantTable
from qdeploy.base.errors import ExportError, ParityError, UsageError
from qdeploy.base.flatbuffer import decode
from qdeploy.base.numerics import sqnr_db
from qdeploy.calibrate.dataset_file import load_calibration
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.cli import main
from qdeploy.engines.base import EngineOptions, load_engine
from qdeploy.export.audit import audit_graph
from qdeploy.export.exporter import export_bundle
from qdeploy.export.open_dims import OpenDims
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.simulate.simulator import restrict_to_numerics
from qdeploy.targets.base import load_target
from qdeploy.targets.tflite_files import norms
from qdeploy.targets.tflite_files.products import ENDS
from qdeploy.targets.tflite_files.read import TWO_ACTIVATIONS
from tests.installed import load_or_skip
from tests.shared_artifacts import build_once

LITERT = load_target("litert")
COMPONENTS = ("text_encoder", "unet", "vae_decoder")
BENCH = ["--rounds", "1", "--pictures", "1", "--steps", "2", "--concurrency", "none", "--fresh-starts", "0"]
NEAR_DB = 1.5  # that LiteRT may be further from the float model than ort-cpu
PICTURES_DB = 15.0  # two roundings of a tiny random model; unrelated pictures are below 5
FLOAT_DB = 100.0  # of all components in float, pictures included: sums in another order

pytestmark = pytest.mark.exports


@pytest.fixture(autouse=True)
def installed() -> None:
    load_or_skip("litert")


def read_codes(path: Path) -> Mapping[str, NDArray[np.int8]]:
    """The int8 weights of a file by layer, outputs first and inputs last, without what pins the range."""
    file, data = read_tflite(path), path.read_bytes()
    buffers = decode(Model, memoryview(data), b"TFL3").buffers
    codes = {}
    for op, operator in file.iter_operators():
        if op not in PRODUCTS:
            continue
        weight = file.tensor(operator.inputs[1])
        if weight.type == TYPES["int8"]:
            place = buffers[weight.buffer]
            array = np.frombuffer(data, np.int8, place.size, place.offset).reshape(get_shape(weight))
            assert not array[..., -ENDS:].any()
            codes[file.tensor(operator.outputs[0]).name] = array[..., :-ENDS]
    return codes


def test_a_bundle_holds_one_file_a_component(int8_litert: Path) -> None:
    bundle = open_bundle(int8_litert)
    assert bundle.manifest.format == "tflite"
    for name in COMPONENTS:
        assert [path.name for path in (int8_litert / name).iterdir()] == ["model.tflite"]
        assert bundle.manifest.components[name].file == f"{name}/model.tflite"
    unet = bundle.manifest.unet
    assert (unet.inputs["timestep"].dtype, unet.inputs["timestep"].shape) == ("int64", ())
    assert unet.inputs["sample"].shape[0] == unet.outputs["noise_pred"].shape[0] == 2


def test_it_is_as_far_from_the_float_model_as_ort_cpu(int8_litert: Path, int8_bundle: Path) -> None:
    ours, others = (open_bundle(path).manifest.components for path in (int8_litert, int8_bundle))
    for name in COMPONENTS:
        assert (ours[name].engine_sqnr_db or 0) > (others[name].engine_sqnr_db or 0) - NEAR_DB
        assert ours[name].parity_engine is None
        assert ours[name].integer_mac_share > 0.8


def test_the_files_hold_the_tables_integers(int8_litert: Path, table: QuantTable) -> None:
    """Those of every layer, never rounded again; a gated one is two layers."""
    for name in COMPONENTS:
        quant = restrict_to_numerics(table.components[name], LITERT.numerics)
        codes = read_codes(int8_litert / name / "model.tflite")
        for layer, expected in quant.layers.items():
            halves = [codes[part] for part in (layer, f"{layer}.gate") if part in codes]
            rows = np.concatenate(halves)
            expected_rows = expected.weight.transpose(0, *range(2, expected.weight.ndim), 1)
            assert np.array_equal(rows, expected_rows), layer
        assert max(np.abs(array.astype(int)).max() for array in codes.values()) == 127


def test_the_audit_names_what_stays_in_float_and_why(int8_litert: Path, table: QuantTable) -> None:
    audit = audit_graph(int8_litert / "unet" / "model.tflite", "litert", files=LITERT.files)
    reasons = {finding.layer: finding.reason for finding in audit.findings if not finding.integer}
    assert {reason for layer, reason in reasons.items() if layer.endswith((".scores", ".values"))} == {TWO_ACTIVATIONS}
    assert reasons["conv_in"] == "float in the graph, by choice"
    integer = {finding.op_type for finding in audit.findings if finding.integer}
    assert integer == {"CONV_2D XNNPACK", "FULLY_CONNECTED XNNPACK"}
    audit.check("unet", restrict_to_numerics(table.components["unet"], LITERT.numerics))


def test_the_audit_counts_what_onnx_counts(int8_litert: Path, int8_tensorrt: Path) -> None:
    """The same layers and multiply-accumulates as in another target's ONNX graph; the range's ends do not count."""
    tensorrt = load_target("tensorrt").files.find_products(int8_tensorrt / "unet" / "model.onnx")
    theirs = {product.name: product.macs for product in tensorrt}
    ours: dict[str, int] = {}
    for product in LITERT.files.find_products(int8_litert / "unet" / "model.tflite"):
        name = product.name.removesuffix(".gate").removesuffix(".rest")
        ours[name] = ours.get(name, 0) + product.macs * (not product.name.endswith(".rest"))
    assert ours == theirs


def test_a_layer_that_xnnpack_does_not_take_fails_the_audit(
    int8_litert: Path, table: QuantTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine("litert")
    ran = engine.kernels(int8_litert / "unet" / "model.tflite", EngineOptions())
    lost = next(kernel for kernel in ran if kernel.integer)
    others = [replace(kernel, integer=kernel.integer and kernel is not lost) for kernel in ran]
    monkeypatch.setattr(engine, "kernels", lambda *_: others)
    audit = audit_graph(int8_litert / "unet" / "model.tflite", "litert", files=LITERT.files)
    with pytest.raises(ExportError, match=f"1 of .* do not run as integer kernels: {lost.names[0]}"):
        audit.check("unet", restrict_to_numerics(table.components["unet"], LITERT.numerics))


def test_channels_are_turned_at_the_ends_and_at_the_heads_only(int8_litert: Path) -> None:
    ops = read_tflite(int8_litert / "unet" / "model.tflite").ops
    heads = ops.count(Op.SOFTMAX) * 4  # q, k, v and the result
    assert ops.count(Op.TRANSPOSE) <= heads + 2


def test_it_makes_ort_cpus_picture(int8_litert: Path, int8_bundle: Path) -> None:
    pixels = []
    for bundle in (int8_litert, int8_bundle):
        with qdeploy.load(bundle, threads=1) as pipe:
            pixels.append(pipe("a red dot", steps=3, seed=1).pixels.astype(np.float32))
    assert sqnr_db(pixels[1], pixels[0]) > PICTURES_DB


def test_in_float_it_is_the_model(float_litert: Path, encoder_bundle: Path) -> None:
    """Each component passed a gate of its own; and a picture from a picture is ort-cpu's, to one of 256 levels."""
    for info in open_bundle(float_litert).manifest.components.values():
        assert (info.engine_sqnr_db or 0) > FLOAT_DB
    pixels = []
    for bundle in (float_litert, encoder_bundle):
        with qdeploy.load(bundle, threads=1) as pipe:
            first = pipe("a red dot", steps=2, seed=1).images[0]
            pixels.append(pipe("a red dot", steps=4, seed=1, image=first, strength=0.5).pixels.astype(int))
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_a_float_graph_that_was_written_wrongly_fails_its_gate(
    tiny_model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "_get_epsilon", lambda node: 0.1)
    with pytest.raises(ParityError, match=r"in fp32 it is .* dB from the float32 model"):
        export_bundle(tiny_model, None, LITERT, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@build_once("litert-w4a8", traces=True)
def w4a8_litert(out: Path, tiny_folder: Path, calibration_file: Path) -> None:
    """4 bits, each skip connection quantized by itself, timesteps from a table."""
    spec = QuantSpec(weight_bits=4, rewrites=("split_skips", "timestep_table"))
    model = load_model(str(tiny_folder))
    export_bundle(model, quantize_model(model, load_calibration(calibration_file), spec), LITERT, out)


def test_four_bits_are_stored_in_eight(w4a8_litert: Path, int8_litert: Path) -> None:
    info = open_bundle(w4a8_litert).manifest.components["text_encoder"]
    assert info.weight_bits == (4,)
    codes = read_codes(w4a8_litert / "text_encoder" / "model.tflite")
    assert max(np.abs(array.astype(int)).max() for array in codes.values()) <= 8
    sizes = [open_bundle(bundle).component_bytes("text_encoder") for bundle in (w4a8_litert, int8_litert)]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[1]


@pytest.mark.parametrize(
    ("dims", "words"), [("batch", "plans its memory for one shape"), ("size", "shapes stand in the file")]
)
def test_open_dimensions_are_refused(tiny_model: LatentDiffusion, tmp_path: Path, dims: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"--target litert cannot leave {dims} open: .*{words}"):
        export_bundle(tiny_model, None, LITERT, tmp_path / "b", open_dims=OpenDims.from_text(dims))


@pytest.mark.parametrize("folder", ["sdxl_folder", "unconditional_folder", "ldm_text_folder", "sd2_folder"])
def test_every_family_of_models_exports(folder: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Two text encoders with pooled text, a VQ first stage, BERT: each component passes its gate in float."""
    manifest = export_bundle(load_model(str(request.getfixturevalue(folder))), None, LITERT, tmp_path / "b")
    assert min(info.engine_sqnr_db or 0 for info in manifest.components.values()) > FLOAT_DB


def test_every_command_takes_the_bundle(int8_litert: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    shown = run(main, ["inspect", str(int8_litert)])
    assert "litert (int8)" in shown.output, shown.output
    shown = run(main, ["inspect", str(int8_litert), "--audit", "--threads", "1"])
    assert "ms a run; the engine does not say of what" in shown.output, shown.output
    assert TWO_ACTIVATIONS in shown.output
    shown = run(main, ["inspect", str(int8_litert / "unet" / "model.tflite")])
    assert "encoder_hidden_states" in shown.output, shown.output
    out = tmp_path / "bench.json"
    shown = run(main, ["--quiet", "bench", str(int8_litert), "--threads", "1", *BENCH, "--json", str(out)])
    assert shown.exit_code == 0, shown.output


@pytest.mark.slow
def test_the_built_in_model_is_as_near_as_ort_cpus(builtin_table: QuantTable, tmp_path: Path) -> None:
    model, names = load_model("builtin:emoji"), ("litert", "ort-cpu")
    bundles = [export_bundle(model, builtin_table, load_target(name), tmp_path / name) for name in names]
    for name in COMPONENTS:
        ours, others = (bundle.components[name].engine_sqnr_db or 0 for bundle in bundles)
        print(f"{name}: litert {ours:.1f} dB, ort-cpu {others:.1f} dB")
        assert ours > others - NEAR_DB
    with qdeploy.load(tmp_path / "litert", threads=1) as pipe:
        assert pipe("a red heart", steps=4, seed=0).pixels.std() > 20
