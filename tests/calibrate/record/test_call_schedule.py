"""Recordings of a call schedule: outside a guidance interval only the text's half ran, and forecast calls did not."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from qdeploy.base.errors import CalibrationError, RequestError
from qdeploy.calibrate.dataset import CalibrationSet, sample_feeds
from qdeploy.calibrate.dataset_file import load_calibration, save_calibration
from qdeploy.calibrate.quantize import choose_probes
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.inspection.describe import describe
from qdeploy.models.source import LatentDiffusion
from qdeploy.sampling.call_schedule import CallSchedule
from qdeploy.sampling.forecast import Forecast

PROMPTS = ["a cat", "a red house", "rocket"]
SETTINGS = TimestepAwareSettings(
    samples=3, steps=5, record=5, batch=2, scheduler="ddim", calls=CallSchedule((0.2, 0.6))
)  # calls 1 and 2 of 0 to 4


@pytest.fixture(scope="module")
def recording(tiny_model: LatentDiffusion) -> CalibrationSet:
    return record_trajectories(tiny_model, PROMPTS, SETTINGS)


def test_samples_say_whether_they_were_guided(recording: CalibrationSet, tiny_model: LatentDiffusion) -> None:
    assert recording.guided is not None
    assert recording.guided.view(5, 3).tolist() == [[False] * 3, [True] * 3, [True] * 3, [False] * 3, [False] * 3]
    assert recording.count("unet") == 3 * (2 * 2 + 3)
    assert recording.provenance["guidance_interval"] == [0.2, 0.6]
    everywhere = record_trajectories(tiny_model, PROMPTS, replace(SETTINGS, calls=CallSchedule()))
    assert everywhere.guided is None
    assert "guidance_interval" not in everywhere.provenance
    assert torch.equal(recording.sample[:3], everywhere.sample[:3])  # the same noise
    assert not torch.equal(recording.sample[3:6], everywhere.sample[3:6])  # after a call without guidance


def test_batches_hold_what_the_unet_was_given(recording: CalibrationSet) -> None:
    """Both halves for a guided sample, the text's for another; never both kinds in one call."""
    guided = dict(zip(recording.timestep.tolist(), recording.guided.tolist(), strict=True))
    rows = 0
    for feeds in recording.batches("unet", 4):
        x, context = feeds["sample"], feeds["encoder_hidden_states"]
        empty = (context == recording.contexts[0].float()).flatten(1).all(1)
        assert empty.tolist() == [guided[int(feeds["timestep"])] and row < len(x) // 2 for row in range(len(x))]
        rows += len(x)
    assert rows == recording.count("unet")
    assert sum(len(feeds["sample"]) for feeds in sample_feeds(recording, "unet", 7)) == 7


def test_probes_have_the_graphs_batch(recording: CalibrationSet) -> None:
    """Three samples outside the interval are one and a half calls of two rows; the half is no probe."""
    probes = choose_probes(recording, "unet")
    assert {len(feeds["sample"]) for feeds in probes} == {2}
    assert {bool((feeds["sample"][0] == feeds["sample"][1]).all()) for feeds in probes} == {True, False}


def test_it_is_kept_in_the_file(recording: CalibrationSet, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_calibration(recording, path)
    assert torch.equal(load_calibration(path).guided, recording.guided)
    assert "15 x [4, 8, 8], both guidance halves of 6, the others without" in dict(describe(str(path)))["unet samples"]
    for broken in (
        replace(recording, guided=recording.guided[1:]),
        replace(recording, is_guided=False),
        replace(recording, guided=recording.guided.long()),
    ):
        save_calibration(broken, path)
        with pytest.raises(CalibrationError, match="`guided`"):
            load_calibration(path)


def test_calls_that_are_forecast_are_not_recorded(tiny_model: LatentDiffusion) -> None:
    forecast = Forecast("reuse", warmup=0.2, last=0.2, window=2, growth=0)
    settings = replace(SETTINGS, calls=CallSchedule(forecast=forecast))
    recording = record_trajectories(tiny_model, PROMPTS, settings)
    every = record_trajectories(tiny_model, PROMPTS, replace(SETTINGS, calls=CallSchedule()))
    timesteps = every.timestep.view(5, 3)[:, 0].tolist()
    assert recording.timestep.view(-1, 3)[:, 0].tolist() == [timesteps[0], timesteps[2], timesteps[4]]
    assert torch.equal(recording.sample[:3], every.sample[:3])
    assert not torch.equal(recording.sample[3:6], every.sample[6:9])  # after a forecast
    assert recording.provenance["forecast"] == asdict(forecast)
    with pytest.raises(RequestError, match="1 model calls, of which none can be forecast"):
        record_trajectories(tiny_model, PROMPTS, replace(settings, steps=1))


def test_an_interval_without_a_call_is_refused(tiny_model: LatentDiffusion) -> None:
    with pytest.raises(RequestError, match="holds none of the model calls 1 to 5"):
        record_trajectories(tiny_model, PROMPTS, replace(SETTINGS, calls=CallSchedule((0.9, 0.95))))
    with pytest.raises(RequestError, match="nothing is guided here"):
        record_trajectories(tiny_model, PROMPTS, replace(SETTINGS, guidance_scale=1.0))
