"""Runs that end by the clock, and runs in threads that do not wait for each other."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from training.clock import Clock
from training.loop import Training, make_parser, read_checkpoint
from training.workers import mirror, train_in_threads

NOW = datetime(2026, 5, 1, 12).timestamp()


def settings(work: Path, *more: str) -> argparse.Namespace:
    return make_parser("", samples=4000, batch=4, lr=0.05).parse_args(["--work", str(work), *more])


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    moment = [NOW]
    monkeypatch.setattr("training.clock.time.time", lambda: moment[0])
    return moment


def test_the_rate_stands_then_falls_to_a_hundredth(now: list[float], tmp_path: Path) -> None:
    clock = Clock.from_options(settings(tmp_path, "--end", "2026-05-01T13:00", "--decay-minutes", "20"))
    factors = []
    for minutes in (0, 39, 50, 60, 70):
        now[0] = NOW + 60 * minutes
        factors.append(clock.compute_factor())
    assert factors == pytest.approx([1, 1, 0.505, 0.01, 0.01])
    assert clock.is_over


def test_without_an_end_there_is_none(now: list[float], tmp_path: Path) -> None:
    clock = Clock.from_options(settings(tmp_path))
    assert (clock.compute_factor(), clock.is_decaying, clock.is_over) == (1, False, False)


def test_the_state_before_the_rate_falls_is_kept(now: list[float], tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    args = settings(tmp_path, "--end", "2026-05-01T12:30", "--decay-minutes", "10")
    training = Training(tmp_path / "x.ckpt", {"module": module}, optimizer, args)
    weights = {}

    def after_step() -> None:
        weights[training.state.step] = module.weight.detach().clone()
        now[0] += 120  # 2 minutes a step: the 11th begins in the decay, the 16th would begin at the end

    training.run(4, lambda chosen: module(torch.ones(len(chosen), 2)).square().mean(), after_step)
    kept = read_checkpoint(tmp_path / "x-before-decay.ckpt", ["module"])
    assert training.state.step == 15
    assert kept["progress"]["step"] == 10
    assert torch.equal(kept["modules"]["module"]["weight"], weights[10])
    assert read_checkpoint(tmp_path / "x.ckpt", ["module"])["progress"]["step"] == 15


def test_a_mirror_shares_weights_and_not_gradients() -> None:
    module = torch.nn.Linear(3, 2)
    twin = mirror(module)
    twin(torch.ones(1, 3)).sum().backward()
    assert module.weight.grad is None
    assert twin.weight.grad is not None
    with torch.no_grad():
        module.weight.fill_(2)
    assert (twin.weight == 2).all()


def test_threads_train_one_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, target = torch.nn.Linear(4, 1), torch.randn(1, 4)
    args = settings(tmp_path, "--threads", "3")
    training = Training(tmp_path / "x.ckpt", {"module": module}, torch.optim.Adam(module.parameters()), args)
    counted = np.zeros(8, int)

    def loss_of(twin: torch.nn.Module, chosen: np.ndarray) -> torch.Tensor:
        assert twin is not module
        np.add.at(counted, chosen, 1)
        x = torch.randn(len(chosen), 4)
        return (twin(x) - x @ target.T).square().mean()

    assert training.run_in_threads(module, 8, loss_of)
    assert training.state.seen == 4000
    assert training.state.step == 1000
    assert 4000 <= counted.sum() <= 4000 + 2 * 4  # what other threads had begun at the end
    assert (module.weight - target).abs().max() < 0.05


def test_a_stopped_run_is_saved_and_goes_on(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 1)

    def training() -> Training:
        return Training(
            tmp_path / "x.ckpt", {"module": module}, torch.optim.Adam(module.parameters()), settings(tmp_path)
        )

    first = training()
    first.run(4, lambda chosen: module(torch.ones(len(chosen), 2)).mean(), after_step=first.stop)
    assert first.state.step == 1
    again = training()
    assert again.state.step == 1
    assert not again.stopped


def test_an_error_in_a_thread_ends_the_run() -> None:
    def step(twin: torch.nn.Module) -> torch.Tensor:
        raise FloatingPointError("loss became nan")

    with pytest.raises(FloatingPointError, match="nan"):
        train_in_threads(torch.nn.Linear(1, 1), 2, step, lambda loss: True)
