"""The table survives a round trip and refuses what is not one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
        weight_scale=rng.random(3).astype(np.float32),
        weight_bits=bits,
        input=Affine(0.5, 7),
        output=Affine(0.25, 128),
        input_ratio=rng.random(5).astype(np.float32),
        output_ratio=rng.random(3).astype(np.float32),
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
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(TableError, match="qdeploy quantize"):
        load_table(tmp_path / "x.safetensors")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_scale_is_refused(scale: float) -> None:
    with pytest.raises(TableError):
        Affine(scale, 0)
