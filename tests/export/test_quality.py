"""The gate's absolute side: a table that is rubbish is refused, though the engine computes what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qdeploy.artifacts.table import ComponentQuant, QuantTable
from qdeploy.base.errors import ParityError, TableError
from qdeploy.export.exporter import export_component
from qdeploy.export.parity import CLEAR_DB, QUALITY_FLOOR_DB, TARGET_LOSS_MAX_DB, Parity, choose_least_sqnr
from qdeploy.export.table_checks import check_probes
from qdeploy.models.source import LatentDiffusion
from qdeploy.targets.base import load_target


@pytest.mark.parametrize(
    ("recorded_db", "requested_db", "least_db"),
    [
        (None, None, QUALITY_FLOOR_DB),
        (45.0, None, 45.0 - TARGET_LOSS_MAX_DB),
        (20.0, None, QUALITY_FLOOR_DB),
        (-2.3, None, QUALITY_FLOOR_DB),  # a table may say of itself what it likes
        (float("inf"), None, CLEAR_DB - TARGET_LOSS_MAX_DB),
        (20.0, -5.0, -5.0),
        (None, 30.0, 30.0),
    ],
)
def test_the_least_sqnr(recorded_db: float | None, requested_db: float | None, least_db: float) -> None:
    assert choose_least_sqnr(recorded_db, requested_db) == least_db


@pytest.mark.parametrize("simulator_db", [-2.3, 2.9, float("nan")])
def test_too_far_from_the_float_model(simulator_db: float) -> None:
    with pytest.raises(ParityError, match=r"unet: as the table says it.*expected at least 3.0 dB.*--min-sqnr"):
        Parity(100.0, simulator_db, simulator_db).check_quality("unet", QUALITY_FLOOR_DB)
    Parity(100.0, 3.0, 3.0).check_quality("unet", QUALITY_FLOOR_DB)


def shuffle_codes(quant: ComponentQuant) -> ComponentQuant:
    """Each layer's codes in another order: finite, within their bits, and noise."""
    rng = np.random.default_rng(0)
    layers = {
        name: replace(
            layer,
            weight=rng.permutation(layer.weight.reshape(-1)).reshape(layer.weight.shape),
            half_weight=None,
        )
        for name, layer in quant.layers.items()
    }
    return replace(quant, layers=layers)


def test_a_made_table_says_what_its_probes_gave(table: QuantTable) -> None:
    assert all((quant.simulator_sqnr_db or 0) > 10 for quant in table.components.values())


@pytest.mark.exports
def test_noise_for_codes_is_refused_unless_told_otherwise(
    tiny_model: LatentDiffusion, table: QuantTable, tmp_path: Path
) -> None:
    name = "vae_decoder"
    quant, probes = shuffle_codes(table.components[name]), table.probes[name]

    def export(folder: str, min_sqnr_db: float | None) -> None:
        export_component(
            tiny_model, name, quant, probes, load_target("ort-cpu"), tmp_path / folder / name, min_sqnr_db=min_sqnr_db
        )

    with pytest.raises(ParityError, match=r"vae_decoder: as the table says it"):
        export("refused", None)
    export("told", -100)


def test_probes_of_another_shape_are_refused(tiny_model: LatentDiffusion, table: QuantTable) -> None:
    check_probes(table, tiny_model)
    other = [{"latents": np.zeros((1, 3, 8, 8), np.float32)}]
    with pytest.raises(TableError, match=r"probes for vae_decoder are latents float32\[1, 3, 8, 8\]"):
        check_probes(replace(table, probes={**table.probes, "vae_decoder": other}), tiny_model)
    with pytest.raises(TableError, match="no probes for unet"):
        check_probes(replace(table, probes={**table.probes, "unet": []}), tiny_model)
