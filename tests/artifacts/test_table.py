"""The table survives a round trip and refuses what is not one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from qdeploy.artifacts.noise_correction import NoiseCorrection
from qdeploy.artifacts.table import (
    Affine,
    ComponentQuant,
    FloatLayer,
    LayerQuant,
    QuantTable,
    load_table,
    pack_int4,
    save_table,
    unpack_int4,
)
from qdeploy.base.errors import TableError


def small_table(bits: int) -> QuantTable:
    rng = np.random.default_rng(bits)
    half = 2 ** (bits - 1)
    layer = LayerQuant(
        weight=rng.integers(-half, half, (3, 5, 3, 3)).astype(np.int8),
        weight_scale=rng.random(3).astype(np.float32) + np.float32(0.1),
        weight_bits=bits,
        input=Affine(0.5, 7),
        output=Affine(0.25, 128),
        input_ratio=rng.random(5).astype(np.float32) + np.float32(0.1),
        output_ratio=rng.random(3).astype(np.float32) + np.float32(0.1),
        output_zero_point=np.array([0, 128, 255], np.uint8),
        bias=rng.random(3).astype(np.float32),
        passes=2,
        symmetric_scale=0.75,
        half_weight=rng.integers(-64, 65, (3, 5, 3, 3)).astype(np.int8) if bits == 8 else None,
    )
    quant = ComponentQuant(
        {"block.conv": layer},
        {"conv_in": FloatLayer("keep list", 100)},
        {"block.conv": 300},
        rewrites=("split_skips",),
        sensitivity_db={"block.conv": 41.5},
        simulator_sqnr_db=20.5,
    )
    probes = {"unet": [{"sample": np.ones((1, 2), np.float32), "timestep": np.array(3)}]}
    correction = NoiseCorrection(np.array([1, 41]), np.zeros(2, np.float32), np.ones((2, 4), np.float32))
    return QuantTable({"unet": quant}, "builtin:emoji", "ab" * 32, {"spec": {"weight_bits": bits}}, probes, correction)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_round_trip_keeps_everything(tmp_path: Path, bits: int) -> None:
    table = small_table(bits)
    save_table(table, tmp_path / "q.safetensors")
    loaded = load_table(tmp_path / "q.safetensors")
    before, after = table.components["unet"], loaded.components["unet"]
    for field in dataclasses.fields(LayerQuant):
        kept, actual = (getattr(quant.layers["block.conv"], field.name) for quant in (before, after))
        assert np.array_equal(kept, actual), field.name
    assert (after.rewrites, after.sensitivity_db) == (before.rewrites, before.sensitivity_db)
    assert after.simulator_sqnr_db == 20.5
    assert loaded.noise_correction is not None
    assert np.array_equal(loaded.noise_correction.mean, table.noise_correction.mean)
    assert after.float_layers == before.float_layers
    assert after.integer_mac_share() == 0.75
    assert (loaded.model, loaded.model_sha256, loaded.provenance) == (table.model, table.model_sha256, table.provenance)
    assert loaded.probes["unet"][0]["timestep"] == 3


def test_four_bits_take_half_the_space() -> None:
    assert pack_int4(np.zeros(1000, np.int8)).nbytes == 500


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33))
def test_int4_packing_is_exact(codes: list[int]) -> None:
    array = np.array(codes, np.int8)
    assert np.array_equal(unpack_int4(pack_int4(array), array.shape), array)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    save_table(small_table(8), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(TableError, match="not a readable qdeploy table"):
        load_table(path)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"x": np.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(TableError, match="qdeploy quantize"):
        load_table(tmp_path / "x.safetensors")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e308, 1e-46])
def test_an_impossible_scale_is_refused(scale: float) -> None:
    with pytest.raises(TableError):
        Affine(scale, 0)


def rewrite(path: Path, header: Callable[[dict], object], arrays: Callable[[dict], object]) -> Path:
    """The table in ``path`` with its header and arrays changed, as a hostile writer would."""
    with safe_open(path, framework="numpy") as file:
        document = json.loads(file.metadata()["qdeploy_table"])
        tensors = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118 - not a dict
    header(document)
    arrays(tensors)
    save_file(tensors, path, metadata={"qdeploy_table": json.dumps(document)})
    return path


CONV = "unet/block.conv"


def get_layer(document: dict) -> dict:
    return document["components"]["unet"]["layers"]["block.conv"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: get_layer(d).update(weight_bits=99), "weight_bits` is 99, expected an integer <= 8"),
        (lambda d: get_layer(d).update(weight_bits=-3), "weight_bits` is -3, expected an integer >= 2"),
        (lambda d: get_layer(d).update(macs=float("nan")), "not readable as JSON"),
        (lambda d: get_layer(d).update(macs=1.5), "macs` is 1.5, expected an integer"),
        (lambda d: get_layer(d)["input"].update(zero_point=1.5), "zero_point` is 1.5, expected an integer"),
        (lambda d: get_layer(d)["input"].update(zero_point=256), "zero point must lie in 0..255, got 256"),
        (lambda d: get_layer(d)["input"].update(scale=0), "input.scale` is 0, expected a number > 0"),
        (lambda d: get_layer(d)["input"].update(bits=64), "input.bits` is 64"),
        (lambda d: get_layer(d).update(symmetric_scale=-1), "symmetric_scale` is -1"),
        (lambda d: get_layer(d).update(shape=[3, 5, 3, 10**12]), "shape[3]` is 1000000000000"),
        (lambda d: get_layer(d).update(shape=[3, 5, 3, 4]), "does not match [3, 5, 3, 4]"),
        (lambda d: get_layer(d).update(arrays=["surprise"]), "arrays[0]` is 'surprise'"),
        (lambda d: get_layer(d).update(passes=3), "passes` is 3"),
        (lambda d: d["probes"].update(unet=10**9), "probes.unet` is 1000000000, expected an integer <= 1024"),
        (lambda d: d["probes"].update(unet=2), "the 2 probes of unet are incomplete"),
        (lambda d: d.update(components=[]), "`components` is a list of 0, expected an object"),
        (lambda d: d["components"].update(unet=[]), "`components.unet` is a list of 0, expected an object"),
        (lambda d: d["components"]["unet"].update(layers=[]), "layers` is a list of 0, expected an object"),
        (
            lambda d: d["components"].update(spy=d["components"]["unet"]),
            "a component 'spy', which this qdeploy does not know",
        ),
        (lambda d: d.update(provenance=None), "`provenance` is None, expected an object"),
        (lambda d: d.update(schema_version=99), "table schema 99"),
        (lambda d: d.update(schema_version=[]), "`schema_version` is a list of 0"),
        (lambda d: d["provenance"].update(deep=json.loads("[" * 100 + "]" * 100)), "nests"),
        (lambda d: d.pop("probes"), "has no field `probes`"),
    ],
)
def test_an_impossible_header_is_refused(tmp_path: Path, change: Callable[[dict], object], words: str) -> None:
    save_table(small_table(8), tmp_path / "q.safetensors")
    path = rewrite(tmp_path / "q.safetensors", change, lambda tensors: None)
    with pytest.raises(TableError) as error:
        load_table(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def fill(name: str, value: float) -> Callable[[dict], object]:
    return lambda tensors: tensors[f"{CONV}/{name}"].reshape(-1).__setitem__(0, value)


@pytest.mark.parametrize(
    ("bits", "change", "words"),
    [
        (8, fill("weight_scale", np.nan), "weight_scale is float32 or holds NaN"),
        (8, fill("weight_scale", np.inf), "weight_scale is float32 or holds NaN"),
        (8, fill("weight_scale", 0), "weight_scale holds 0, expected only positive"),
        (8, fill("weight_scale", -1), "weight_scale holds -1, expected only positive"),
        (8, fill("input_ratio", np.nan), "input_ratio"),
        (8, fill("output_ratio", 0), "output_ratio holds 0"),
        (8, fill("bias", np.inf), "bias is float32 or holds NaN"),
        (8, fill("half_weight", 127), "half_weight has codes beyond +-64"),
        (6, fill("weight", 100), "expected -32..31 of 6 bits"),
        (4, lambda t: t.update({f"{CONV}/weight": np.zeros(3, np.uint8)}), "is uint8[3], expected uint8[68]"),
        (8, lambda t: t.update({f"{CONV}/weight": t[f"{CONV}/weight"].astype(np.int32)}), "weight must be int8"),
        (8, lambda t: t.update({f"{CONV}/output_zero_point": np.zeros(3, np.float32)}), "expected uint8"),
        (8, lambda t: t.update({f"{CONV}/spare": np.zeros(3)}), "tensors that its header does not list"),
        (8, lambda t: t.pop(f"{CONV}/bias"), "no tensor unet/block.conv/bias"),
        (8, lambda t: t["probe/unet/0/sample"].fill(np.nan), "or holds NaN, expected float32 or int64"),
        (8, lambda t: t.update({"probe/unet/7/sample": np.zeros(1)}), "belongs to none of the 1 probes"),
        (8, lambda t: t["noise_correction/mean"].fill(np.nan), "noise correction: got NaN"),
    ],
)  # fmt: skip
def test_impossible_arrays_are_refused(tmp_path: Path, bits: int, change: Callable[[dict], object], words: str) -> None:
    save_table(small_table(bits), tmp_path / "q.safetensors")
    path = rewrite(tmp_path / "q.safetensors", lambda document: None, change)
    with pytest.raises(TableError) as error:
        load_table(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_infinite_decibels_survive_and_nan_is_not_written(tmp_path: Path) -> None:
    table = small_table(8)
    unet = dataclasses.replace(table.components["unet"], sensitivity_db={"block.conv": float("inf")})
    save_table(dataclasses.replace(table, components={"unet": unet}), tmp_path / "q.safetensors")
    assert load_table(tmp_path / "q.safetensors").components["unet"].sensitivity_db == {"block.conv": float("inf")}
    broken = dataclasses.replace(unet, simulator_sqnr_db=float("nan"))
    with pytest.raises(TableError, match="holds NaN"):
        save_table(dataclasses.replace(table, components={"unet": broken}), tmp_path / "n.safetensors")
    assert not (tmp_path / "n.safetensors").exists()
