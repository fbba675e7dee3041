"""The whole workflow on processors with and without VNNI, on any machine, and the demo itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.manifest import MANIFEST
from qdeploy.artifacts.table import LayerQuant, QuantTable
from qdeploy.base.errors import EngineError, ExportError
from qdeploy.base.numerics import sqnr_db
from qdeploy.cli import main
from qdeploy.export.exporter import export_bundle
from qdeploy.models.source import LatentDiffusion
from qdeploy.passes.check_unshared import check_unshared
from qdeploy.runtime.pipeline import load
from qdeploy.targets.base import load_target
from tests.conftest import export_unet
from tests.processors import every_processor, find_saturating_weights, pretend_processor, without_vnni

LEAST_BETWEEN_DB = 25  # both ranges stand for one weight, 7 bits of it at least


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["--quiet", *arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.exports
@pytest.mark.parametrize("processor", ["vnni", "untold"])  # the demo walks it without VNNI
def test_the_whole_way(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, table_file: Path, tmp_path: Path, processor: str
) -> None:
    """The exported table is the shared one, whose graphs are traced once for all processors."""
    pretend_processor(monkeypatch, processor)
    calib, table, bundle = (str(tmp_path / name) for name in ("calib.safetensors", "table.safetensors", "bundle"))
    run("calibrate", str(tiny_folder), "-o", calib, "--samples", "2", "--steps", "3")
    run("quantize", str(tiny_folder), "--calib", calib, "-o", table)
    run("export", str(table_file), "-o", bundle)
    run("generate", bundle, "a cat", "-o", str(tmp_path / "cat.png"), "--steps", "2")
    run("bench", bundle, "--steps", "2", "--rounds", "1", "--fresh-starts", "1", "--concurrency", "none")
    assert max(open_bundle(bundle).manifest.largest_weight_codes) <= 64


def test_the_demo(demo_folder: Path) -> None:
    """What a newcomer runs first."""
    assert "UNet MACs in int8" in (demo_folder / "printed.txt").read_text()
    assert {"grid.png", "report.md", "bench.json", "fp32", "w8a8"} <= {path.name for path in demo_folder.iterdir()}
    assert find_saturating_weights(demo_folder / "w8a8") == []


@every_processor
def test_a_full_range_bundle_runs_and_says_where_it_is_slow(
    monkeypatch: pytest.MonkeyPatch, full_range_bundle: Path, tmp_path: Path, processor: str
) -> None:
    pretend_processor(monkeypatch, processor)
    made = run("generate", str(full_range_bundle), "a cat", "-o", str(tmp_path / "cat.png"), "--steps", "2")
    assert ("note: this bundle has weight codes beyond" in made.output) == (processor != "vnni")


@pytest.mark.exports
@pytest.mark.parametrize(
    ("processor", "full_range"),
    [
        ("vnni", False),
        ("untold", False),
        pytest.param("no-vnni", True, marks=pytest.mark.slow),
    ],  # the demo is one more
)
def test_the_built_in_unet_passes_both_gates(
    monkeypatch: pytest.MonkeyPatch, builtin_table: QuantTable, tmp_path: Path, processor: str, full_range: bool
) -> None:
    pretend_processor(monkeypatch, processor)
    target = load_target("ort-cpu")
    info = export_unet(builtin_table, target.in_full_range() if full_range else target, tmp_path / "unet")
    assert info.integer_mac_share > 0.95
    assert info.largest_weight_code == (127 if full_range else 64)
    assert find_saturating_weights(tmp_path) == [] or full_range


@pytest.mark.exports
@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_other_targets_pass_their_gates_without_vnni(
    monkeypatch: pytest.MonkeyPatch, tiny_model: LatentDiffusion, table: QuantTable, tmp_path: Path, target: str
) -> None:
    pretend_processor(monkeypatch, "no-vnni")
    manifest = export_bundle(tiny_model, table, load_target(target), tmp_path / "bundle")
    assert max(manifest.largest_weight_codes) == (64 if target == "openvino" else 127)  # GPUs keep the full range
    assert (find_saturating_weights(tmp_path / "bundle") == []) == (target == "openvino")


@pytest.mark.exports
@without_vnni
def test_openvino_refuses_a_full_range_bundle_at_export(
    monkeypatch: pytest.MonkeyPatch, tiny_model: LatentDiffusion, table: QuantTable, tmp_path: Path, processor: str
) -> None:
    pretend_processor(monkeypatch, processor)
    with pytest.raises(EngineError, match="without --full-range"):
        export_bundle(tiny_model, table, load_target("openvino").in_full_range(), tmp_path / "b")
    assert not (tmp_path / "b").exists()


@every_processor
def test_an_older_manifest_takes_the_safe_way(
    monkeypatch: pytest.MonkeyPatch, full_range_bundle: Path, tmp_path: Path, processor: str
) -> None:
    import shutil

    pretend_processor(monkeypatch, processor)
    old = tmp_path / "old"
    shutil.copytree(full_range_bundle, old)
    document = json.loads((old / MANIFEST).read_text())
    for entry in document["components"].values():
        del entry["largest_weight_code"]
    (old / MANIFEST).write_text(json.dumps(document))
    assert set(open_bundle(old).manifest.largest_weight_codes) == {None}
    with load(full_range_bundle) as new_pipe, load(old) as old_pipe:
        latents = [pipe("a cat", steps=2, seed=1).latents for pipe in (new_pipe, old_pipe)]
    assert (latents[0] == latents[1]).all()


def test_an_older_manifest_of_four_bits_or_float_needs_no_option() -> None:
    from qdeploy.artifacts.manifest import bound_weight_code

    assert [bound_weight_code(bits) for bits in ((8,), (8, 4), (7,), (4,), (32,), (16,))] == [None, None, 64, 8, 0, 0]


def test_two_products_on_one_weight_are_named(int8_bundle: Path) -> None:
    model = ir.load(int8_bundle / "unet" / "model.onnx")
    check_unshared(model)
    reshapes = [node for node in model.graph if node.op_type == "Reshape" and "_again" in str(node.name)]
    assert reshapes
    for node in reshapes:
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
        model.graph.remove(node, safe=True)
    with pytest.raises(ExportError, match="read by two integer products"):
        check_unshared(model)


def test_one_table_serves_both_ranges(table: QuantTable) -> None:
    for quant in table.components.values():
        for name, layer in quant.layers.items():
            half = layer.in_half_range()
            assert np.abs(half.weight.astype(int)).max() <= 64, name
            assert (half.weight_scale == 2 * layer.weight_scale).all()
            assert half.in_half_range() is half
            both = [codes * scale[(...,) + (None,) * (codes.ndim - 1)] for codes, scale in pair_codes(layer, half)]
            assert sqnr_db(*both) > LEAST_BETWEEN_DB, name


def pair_codes(layer: LayerQuant, half: LayerQuant) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(one.weight.astype(np.float32), one.weight_scale) for one in (layer, half)]


def test_no_weight_of_a_default_bundle_can_saturate(int8_bundle: Path, full_range_bundle: Path) -> None:
    """16-bit sums of every pair of weights of an output channel, at the worst activations."""
    assert find_saturating_weights(int8_bundle) == []
    assert len(find_saturating_weights(full_range_bundle)) > 20
