"""The GPU targets on the tiny model: what their graphs hold, what the gate says, and TensorRT's own acceptance."""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

import qdeploy
from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.manifest import ComponentInfo
from qdeploy.artifacts.table import Affine, AttentionQuant, QuantTable
from qdeploy.base.errors import EngineUnavailableError, ExportError, ParityError, TableError, UsageError
from qdeploy.base.progress import OnProgress
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.cli import main
from qdeploy.engines.base import load_engine
from qdeploy.engines.nvidia import plans
from qdeploy.engines.nvidia.caches import make_cache_folder
from qdeploy.engines.nvidia.machine import find_missing_package
from qdeploy.engines.nvidia.profiles import Profile, read_profile, sizes_from_text
from qdeploy.export.exporter import export_bundle, export_component
from qdeploy.export.open_dims import OpenDims
from qdeploy.export.parity import Parity
from qdeploy.inspection.audit import describe_audit
from qdeploy.inspection.describe import format_gate
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.simulate.simulator import restrict_to_numerics
from qdeploy.targets.base import Numerics, load_target

TENSORRT = load_target("tensorrt")
HALF, FULL = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
PARTS = ("text_encoder", "unet", "vae_decoder")


def graph(bundle: Path, component: str) -> onnx.GraphProto:
    return onnx.load(bundle / component / "model.onnx", load_external_data=False).graph


def read_components(bundle: Path) -> dict[str, ComponentInfo]:
    return dict(open_bundle(bundle).manifest.components)


def check_acceptance(bundle: Path) -> None:
    """Every graph was built by the library; skipped with the export's own words where there is none."""
    check_accepted({info.acceptance for info in read_components(bundle).values()})


def check_accepted(phrases: set[str]) -> None:
    (said,) = phrases
    if said.startswith("not built on trial: "):
        pytest.skip(said)
    assert said == "built by TensorRT-RTX 1.7.1"


def test_the_library_builds_the_tiny_models_fp16_graphs(fp16_tensorrt: Path) -> None:
    check_acceptance(fp16_tensorrt)


def test_the_library_builds_the_tiny_models_int8_graphs(int8_tensorrt: Path) -> None:
    check_acceptance(int8_tensorrt)


@pytest.mark.slow
def test_the_library_builds_the_built_in_models_fp16_graphs(tmp_path: Path) -> None:
    export_bundle(load_model("builtin:emoji"), None, TENSORRT, tmp_path / "b")
    check_acceptance(tmp_path / "b")


@pytest.mark.slow
def test_the_library_builds_the_built_in_models_int8_graphs(tmp_path: Path) -> None:
    model = load_model("builtin:emoji")
    calibration = record_trajectories(model, ["red apple"], TimestepAwareSettings(samples=1, steps=2, record=2))
    table = quantize_model(model, calibration, QuantSpec())
    export_bundle(model, table, TENSORRT, tmp_path / "b")
    check_acceptance(tmp_path / "b")


@pytest.mark.exports
def test_the_library_builds_what_a_table_can_hold(
    tiny_model: LatentDiffusion, calibration: CalibrationSet, tmp_path: Path
) -> None:
    """4 bits, both rewrites, the first token in float, and attention in integers, which stays in fp16 here."""
    spec = QuantSpec(
        weight_bits=4, rewrites=("split_skips", "timestep_table"), first_token_float=True, attention_bits=8
    )
    made = quantize_model(tiny_model, calibration, spec)
    quant, probes = made.components["unet"], made.probes["unet"]
    info = export_component(tiny_model, "unet", quant, probes, TENSORRT, tmp_path / "unet")
    assert quant.attention
    assert info.weight_bits == (4,)
    check_accepted({info.acceptance})


def test_the_library_builds_a_codebook(codebook_tensorrt: Path) -> None:
    lowered = onnx.shape_inference.infer_shapes(onnx.load(codebook_tensorrt / "vae_decoder" / "model.onnx")).graph
    types = {value.name: value.type.tensor_type.elem_type for value in lowered.value_info}
    (chosen,) = (node for node in lowered.node if node.op_type == "ArgMin")
    assert types[chosen.input[0]] == FULL
    check_acceptance(codebook_tensorrt)


@pytest.mark.parametrize("component", PARTS)
def test_every_layer_but_the_shortcuts_is_quantized_around_0(
    int8_tensorrt: Path, table: QuantTable, component: str
) -> None:
    lowered = graph(int8_tensorrt, component)
    types = {tensor.name: tensor.data_type for tensor in lowered.initializer}
    readers = {value: node for node in lowered.node for value in node.input}
    quant = table.components[component]
    twice = {name for name, layer in quant.layers.items() if layer.passes == 2}
    assert bool(twice) == (component == "unet")
    for name in quant.layers:
        expected = HALF if name in twice else onnx.TensorProto.INT8
        assert types[f"{name}.weight" if name in twice else f"{name}.weight_quant.codes"] == expected
    quantizers = [node for node in lowered.node if node.op_type == "QuantizeLinear"]
    assert {types[node.input[1]] for node in quantizers} == {HALF}
    assert {types[node.input[2]] for node in quantizers} == {onnx.TensorProto.INT8}
    assert {readers[node.output[0]].op_type for node in quantizers} == {"DequantizeLinear"}


def test_nothing_is_quantized_after_a_convolution(int8_tensorrt: Path) -> None:
    lowered = graph(int8_tensorrt, "vae_decoder")
    producers = {value: node.op_type for node in lowered.node for value in node.output}
    sources = {producers[node.input[0]] for node in lowered.node if node.op_type == "QuantizeLinear"}
    assert sources <= {"Mul", "Add", "Reshape", "Transpose", "Resize"}


def test_inputs_and_outputs_stay_float32(fp16_tensorrt: Path, int8_tensorrt: Path, int8_bundle: Path) -> None:
    expected = {name: (info.inputs, info.outputs) for name, info in read_components(int8_bundle).items()}
    for bundle in (fp16_tensorrt, int8_tensorrt):
        assert {name: (info.inputs, info.outputs) for name, info in read_components(bundle).items()} == expected


def test_half_the_bytes_of_float32(fp16_tensorrt: Path, float_bundle: Path) -> None:
    size = [(bundle / "unet" / "model.onnx.data").stat().st_size for bundle in (fp16_tensorrt, float_bundle)]
    assert size[0] == pytest.approx(size[1] / 2, rel=0.01)


def test_only_the_angles_of_the_timestep_stay_float32(fp16_tensorrt: Path) -> None:
    model = onnx.load(fp16_tensorrt / "unet" / "model.onnx")
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    full = Counter(node.op_type for node in model.graph.node if types.get(node.output[0]) == FULL)
    assert set(full) <= {"Cast", "Unsqueeze", "Expand", "Mul", "Sin", "Cos"}
    assert full["Sin"] == full["Cos"] == 1


def test_the_gate_says_what_it_computed_and_what_it_did_not(fp16_tensorrt: Path, int8_tensorrt: Path) -> None:
    info = read_components(int8_tensorrt)["unet"]
    assert (info.parity_engine, info.weight_bits, info.act_bits) == ("ort-cpu", (8,), 8)
    assert info.integer_mac_share > 0.88  # what is read in two passes elsewhere is in fp16 here
    texts = ", ".join(format_gate(info))
    assert "in the file" in texts
    assert "computed by ort-cpu instead of the engine" in texts
    half = read_components(fp16_tensorrt)["unet"]
    assert (half.weight_bits, half.act_bits, half.parity_db) == ((16,), 16, None)
    assert half.engine_sqnr_db is not None
    assert half.engine_sqnr_db > 55


def test_the_graph_agrees_with_the_simulator(int8_tensorrt: Path) -> None:
    for info in read_components(int8_tensorrt).values():
        assert info.parity_db is not None
        assert info.parity_db > info.simulator_sqnr_db
        assert info.engine_sqnr_db == pytest.approx(info.simulator_sqnr_db, abs=1)


def test_no_engine_is_no_picture(int8_tensorrt: Path) -> None:
    """Native TensorRT cannot be installed where tests run; what is missing is one clear error everywhere."""
    if not find_missing_package(load_engine("tensorrt").versions):
        pytest.skip("TensorRT and a GPU are here")
    with pytest.raises(EngineUnavailableError, match=r"tensorrt cannot run here: .*pip install 'qdeploy"):
        qdeploy.load(int8_tensorrt)
    shown = CliRunner().invoke(main, ["--quiet", "generate", str(int8_tensorrt), "a cat", "-o", "cat.png"])
    assert shown.exit_code == 1
    assert "tensorrt cannot run here" in " ".join(shown.output.split())
    with pytest.raises(EngineUnavailableError, match="cannot run"):
        describe_audit(int8_tensorrt)


@pytest.mark.exports
def test_open_sizes_go_with_a_profile(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    free, sizes = OpenDims(batch=True, size=True), sizes_from_text("batch=1:2:4,height=16:16:32,width=16:16:32")
    manifest = export_bundle(tiny_model, None, TENSORRT, tmp_path / "open", open_dims=free, sizes=sizes)
    assert {info.acceptance for info in manifest.components.values()} == {"not built on trial: its sizes are open"}
    shapes = read_profile(tmp_path / "open/unet/model.onnx")["sample"]
    assert (shapes.min, shapes.max) == ((1, 4, 8, 8), (4, 4, 16, 16))
    assert "unet/profile.json" in open_bundle(tmp_path / "open").files


@pytest.mark.parametrize(
    ("target", "dynamic", "profile", "problem"),
    [
        ("tensorrt", True, False, "give it, such as --profile"),
        ("tensorrt", False, True, "with --dynamic"),
        ("ort-cpu", True, True, "only --target tensorrt"),
    ],
)
def test_a_profile_without_open_sizes_or_the_other_way_round(
    tiny_model: LatentDiffusion, tmp_path: Path, target: str, dynamic: bool, profile: bool, problem: str
) -> None:
    sizes = sizes_from_text("batch=2,height=16,width=16") if profile else None
    with pytest.raises(UsageError, match=problem):
        export_bundle(
            tiny_model, None, load_target(target), tmp_path / "x", open_dims=OpenDims(size=dynamic), sizes=sizes
        )


def test_a_build_that_cannot_be_is_refused_before_the_export(tiny_folder: Path, tmp_path: Path) -> None:
    asked = ["--quiet", "export", str(tiny_folder), "-o", str(tmp_path / "b"), "--build"]
    shown = CliRunner().invoke(main, asked)
    assert shown.exit_code == 2
    assert "--build: only --target tensorrt has engines" in " ".join(shown.output.split())
    if not find_missing_package(load_engine("tensorrt").versions):
        pytest.skip("TensorRT and a GPU are here")
    shown = CliRunner().invoke(main, [*asked, "--target", "tensorrt"])
    assert shown.exit_code == 1
    assert "tensorrt cannot run here" in " ".join(shown.output.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exports
def test_a_build_puts_plans_into_the_bundle(
    tiny_model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a made-up TensorRT; the plans are listed in the manifest, which lets the engine take them."""
    engine = importlib.import_module("qdeploy.engines.tensorrt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(engine, "versions", lambda: {"tensorrt": "10.9.0"})

    def build(path: Path, profile: Profile, on_progress: OnProgress) -> tuple[plans.PlanKey, bytes]:
        return plans.build_key(path, profile, "10.9.0", (9, 0)), b"code"

    monkeypatch.setattr(engine, "build_plan", build)
    monkeypatch.setattr(engine, "open_session", load_engine("ort-cpu").open_session)
    manifest = export_bundle(tiny_model, None, TENSORRT, tmp_path / "b", build=True)
    assert manifest.components["unet"].parity_engine is None
    assert "instead of the engine" not in ", ".join(format_gate(manifest.components["unet"]))
    assert {f"{part}/model.plan" for part in PARTS} <= set(open_bundle(tmp_path / "b").files)
    graph_file = tmp_path / "b" / "unet" / "model.onnx"
    key = plans.build_key(graph_file, read_profile(graph_file), "10.9.0", (9, 0))
    assert plans.read_bundled_plan(graph_file, key, make_cache_folder(engine.CACHE)) == b"code"


@pytest.mark.exports
def test_a_float_graph_for_cuda(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    manifest = export_bundle(tiny_model, None, load_target("ort-cuda"), tmp_path / "b")
    assert (manifest.engine, manifest.precision) == ("ort-cuda", "fp16")
    weights = [one for one in graph(tmp_path / "b", "vae_decoder").initializer if one.name.endswith(".weight")]
    assert {tensor.data_type for tensor in weights} == {HALF}


def test_an_overflow_in_fp16_is_found(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_folder))
    model.text_encoders["text_encoder"].inner.encoder.layers[0].mlp.fc2.weight.data *= 1e6
    with pytest.raises(ExportError, match=r"text_encoder: values beyond fp16's 65504 are output by .*mlp\.fc2"):
        export_bundle(model, None, load_target("ort-cuda"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_gate_of_a_float_graph() -> None:
    Parity(60, float("inf"), 60).check_float("unet", "fp16", TENSORRT.parity)
    for sqnr_db in (20, float("nan")):
        with pytest.raises(ParityError, match="unet: in fp16 it is"):
            Parity(sqnr_db, float("inf"), sqnr_db).check_float("unet", "fp16", TENSORRT.parity)


def test_a_table_is_refused_for_cuda(tiny_model: LatentDiffusion, table: QuantTable, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--target tensorrt takes tables"):
        export_bundle(tiny_model, table, load_target("ort-cuda"), tmp_path / "b")


def test_a_table_without_symmetric_scales_is_refused(
    tiny_model: LatentDiffusion, table: QuantTable, tmp_path: Path
) -> None:
    old = {
        name: dataclasses.replace(
            quant, layers={n: dataclasses.replace(one, symmetric_scale=None) for n, one in quant.layers.items()}
        )
        for name, quant in table.components.items()
    }
    with pytest.raises(TableError, match="symmetric input scale"):
        export_bundle(tiny_model, dataclasses.replace(table, components=old), TENSORRT, tmp_path / "b")


def test_what_a_target_has_no_integers_for_stays_in_float(table: QuantTable) -> None:
    affine = Affine(0.1, 128)
    quant = dataclasses.replace(table.components["unet"], attention={"attn1": AttentionQuant(affine, affine, affine)})
    kept = restrict_to_numerics(quant, TENSORRT.numerics)
    twice = {name for name, layer in quant.layers.items() if layer.passes == 2}
    assert set(kept.layers) == set(quant.layers) - twice
    assert all("read in two passes" in kept.float_layers[name].reason for name in twice)
    assert kept.attention == {}
    assert kept.total_macs == quant.total_macs
    assert restrict_to_numerics(kept, TENSORRT.numerics) == kept
    assert restrict_to_numerics(quant, Numerics(half_range_weights=False)) == quant
