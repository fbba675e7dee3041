"""What every training script shares: options, the schedule, the shuffled order, checkpoints and the loop itself."""

from __future__ import annotations

import argparse
import json
import math
import pickle
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdeploy.base.errors import UsageError
from training.clock import Clock, add_clock_options
from training.workers import train_in_threads


def make_parser(description: str | None, *, samples: int, batch: int, lr: float) -> argparse.ArgumentParser:
    """The options of every training script, with its own defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--samples", type=int, default=samples, help="samples to train on in all")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--threads", type=int, default=2, help="of the UNets' training: one a core")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; run again to go on")
    add_clock_options(parser)
    return parser


def learning_rate(peak: float, seen: int, total: int, warmup: int = 4_000) -> float:
    """Linear warm-up over ``warmup`` samples, constant to 50 %, then a cosine to 1 % of the peak."""
    done = seen / total
    decay = 1.0 if done < 0.5 else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - 0.5) / 0.5))
    return peak * min(1.0, (seen + 1) / warmup) * decay


def read_checkpoint(path: Path, modules: Iterable[str]) -> dict[str, Any]:
    """What ``LoopState.save`` wrote; UsageError that names the file when it is cut or another script's."""
    try:
        saved = torch.load(path, weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as exc:
        raise UsageError(f"{path} is cut or no checkpoint ({exc}); remove it to begin anew") from exc
    names = sorted(saved["modules"]) if isinstance(saved, dict) and "modules" in saved else []
    if names != sorted(modules):
        raise UsageError(f"{path} holds {names}, expected {sorted(modules)}; remove it to begin anew")
    return saved


@dataclass
class LoopState:
    """Progress of a run: samples seen, steps, smoothed loss, and the shuffled order still to come."""

    seen: int = 0
    step: int = 0
    loss: float = math.nan
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    order: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def next_batch(self, count: int, size: int) -> np.ndarray:
        """The next ``size`` indices, each picture once before any comes again."""
        while len(self.order) < size:
            self.order = np.concatenate([self.order, self.rng.permutation(count)])
        take, self.order = self.order[:size], self.order[size:]
        return take

    def add_loss(self, loss: float, size: int) -> None:
        """Count a batch of ``size`` and add its loss to the running mean; FloatingPointError for NaN or infinity."""
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss became {loss} at step {self.step}")
        self.loss = loss if math.isnan(self.loss) else 0.99 * self.loss + 0.01 * loss
        self.seen += size
        self.step += 1

    def save(self, path: Path, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint, first under another name, so that an interruption leaves the last one whole."""
        part_path = path.with_suffix(".part")
        torch.save(
            {
                "modules": {name: module.state_dict() for name, module in modules.items()},
                "optimizer": optimizer.state_dict(),
                "progress": {"seen": self.seen, "step": self.step, "loss": self.loss},
            },
            part_path,
        )
        part_path.replace(path)

    def record(self, path: Path, name: str, batch: int) -> None:
        """Add this run's samples, steps, batch and smoothed loss to a JSON file, for the model card."""
        facts = json.loads(path.read_text()) if path.exists() else {}
        facts |= {f"{name}_samples": self.seen, f"{name}_steps": self.step}
        facts |= {f"{name}_batch": batch, f"{name}_loss": self.loss}
        path.write_text(json.dumps(facts, indent=1) + "\n")

    @classmethod
    def resume(cls, path: Path, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> LoopState:
        """Load the checkpoint at ``path`` into ``modules`` and ``optimizer``; a new state where there is none."""
        if not path.exists():
            return cls()
        saved = read_checkpoint(path, modules)
        for name, module in modules.items():
            module.load_state_dict(saved["modules"][name])
        optimizer.load_state_dict(saved["optimizer"])
        state = cls(**saved["progress"])
        state.rng = np.random.default_rng(state.step)  # a fresh order, not the first one again
        torch.manual_seed(state.step)
        return state


@dataclass
class Training:
    """One run that can be interrupted: what is trained, by which optimizer, and the file that keeps both.

    settings: samples in all, batch, peak learning rate, minutes, as ``make_parser`` reads them.
    """

    checkpoint: Path
    modules: dict[str, torch.nn.Module]
    optimizer: torch.optim.Optimizer
    settings: argparse.Namespace
    state: LoopState = field(init=False)
    clock: Clock = field(init=False)
    stopped: bool = field(init=False, default=False)
    at_full_rate: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.state = LoopState.resume(self.checkpoint, self.modules, self.optimizer)
        self.clock = Clock.from_options(self.settings)
        signal.signal(signal.SIGTERM, lambda *_: self.stop())

    def stop(self) -> None:
        """End the run at the next step; it is saved as at any end."""
        self.stopped = True

    def run(
        self,
        pictures: int,
        loss_of: Callable[[np.ndarray], torch.Tensor],
        after_step: Callable[[], None] = lambda: None,
        report: Callable[[], str] = lambda: "",
        save_every: int = 300,
    ) -> bool:
        """Train to the end or for the minutes asked, and save; False when minutes ran out before the end.

        compute_loss: loss of the pictures with these indices, ``int64[batch]`` below ``pictures``.
        report: what to print with each checkpoint; random numbers that it draws do not change the run.
        """
        state, settings = self.state, self.settings
        started, first = time.monotonic(), state.seen
        while self.should_continue(started):
            loss = loss_of(state.next_batch(pictures, settings.batch))
            loss.backward()
            self._apply(loss.item())
            after_step()
            self._report(started, first, report, save_every)
        self.save()
        return state.seen >= settings.samples

    def run_in_threads(
        self,
        module: torch.nn.Module,
        pictures: int,
        loss_of: Callable[[torch.nn.Module, np.ndarray], torch.Tensor],
        after_step: Callable[[], None] = lambda: None,
        report: Callable[[], str] = lambda: "",
        save_every: int = 300,
    ) -> bool:
        """As ``run``, on ``settings.threads`` cores; ``compute_loss`` is given its own thread's ``module``."""
        state, settings = self.state, self.settings
        started, first = time.monotonic(), state.seen

        def apply(loss: float) -> bool:
            self._apply(loss)
            after_step()
            self._report(started, first, report, save_every)
            return self.should_continue(started)

        if self.should_continue(started):
            train_in_threads(
                module,
                settings.threads,
                lambda replica: loss_of(replica, state.next_batch(pictures, settings.batch)),
                apply,
            )
        self.save()
        return state.seen >= settings.samples

    @property
    def checkpoint_before_decay(self) -> Path:
        """The last checkpoint at the full rate: what a longer run goes on from."""
        return self.checkpoint.with_name(f"{self.checkpoint.stem}-before-decay.ckpt")

    def should_continue(self, started: float) -> bool:
        """False once samples, minutes or the clock are used up, or Ctrl-C was pressed."""
        state, settings = self.state, self.settings
        in_time = time.monotonic() < started + 60 * settings.minutes and not self.clock.is_over
        return state.seen < settings.samples and in_time and not self.stopped

    def _report(self, started: float, first: int, report: Callable[[], str], save_every: int) -> None:
        state = self.state
        if state.step % 50 == 0:
            say(state, self.settings.samples, started, first)
        if state.step % save_every == 0:
            with torch.random.fork_rng(), torch.no_grad():
                print(f"  {report()}", flush=True)
            self.save()

    def _apply(self, loss: float) -> None:
        """Update the weights from the gradients."""
        state, settings = self.state, self.settings
        if self.clock.is_decaying and self.at_full_rate:
            state.save(self.checkpoint_before_decay, self.modules, self.optimizer)
        self.at_full_rate = not self.clock.is_decaying
        for group in self.optimizer.param_groups:
            group["lr"] = self.clock.compute_factor() * learning_rate(settings.lr, state.seen, settings.samples)
        torch.nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.add_loss(loss, settings.batch)

    def save(self) -> None:
        """Write the checkpoint now."""
        self.state.save(self.checkpoint, self.modules, self.optimizer)


def say(state: LoopState, total: int, started: float, first: int) -> None:
    """Print one line of progress: loss, samples a second and minutes left."""
    rate = (state.seen - first) / (time.monotonic() - started)
    eta_min = (total - state.seen) / rate / 60
    print(f"{state.seen}/{total} loss {state.loss:.4f} {rate:.1f}/s eta {eta_min:.0f} min", flush=True)
