"""Check that the engine agrees with the simulator: both, and the float model, run on the table's recorded inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qdeploy.base.errors import ParityError
from qdeploy.base.numerics import sqnr_db
from qdeploy.engines.base import Session
from qdeploy.targets.base import ParityLimits

Probes = Sequence[Mapping[str, NDArray]]
MIN_VALUES = 1_000_000  # two pictures of 512 x 512, which take a decoder a minute; every probe of smaller outputs


@dataclass(frozen=True)
class Parity:
    """SQNR in dB over all probes: engine against simulator, and each of the two against the float model."""

    between_db: float
    simulator_db: float
    engine_db: float

    def check(self, component: str, limits: ParityLimits) -> None:
        """ParityError when they differ by more than spread rounding explains (NaN counts as differing)."""
        between_min_db = self.simulator_db - limits.between_slack_db
        engine_min_db = self.simulator_db - limits.engine_loss_db
        agree, no_worse = self.between_db >= between_min_db, self.engine_db >= engine_min_db
        if not (agree and no_worse):
            raise ParityError(
                f"{component}: the engine does not compute what the table says. SQNR of engine against simulator "
                f"{self.between_db:.1f} dB, against the float model {self.engine_db:.1f} dB (engine) and "
                f"{self.simulator_db:.1f} dB (simulator); expected at least {between_min_db:.1f} "
                f"and {engine_min_db:.1f} dB. Report the graph with this message"
            )

    def check_float(self, component: str, float_type: str, limits: ParityLimits) -> None:
        """ParityError when a float graph is further from the float32 model than rounding explains."""
        if not self.engine_db >= limits.float_min_db:
            raise ParityError(
                f"{component}: in {float_type} it is {self.engine_db:.1f} dB from the float32 model, expected at least "
                f"{limits.float_min_db:.0f} dB. Report the graph with this message"
            )


@dataclass(frozen=True)
class ExpectedOutputs:
    """Outputs of the float model and the simulator for some probes, so that neither is in memory with the engine."""

    probes: Probes
    reference: Sequence[NDArray[np.float32]]
    simulator: Sequence[NDArray[np.float32]]


def compute_expected(float_component: nn.Module, simulator: nn.Module, probes: Probes) -> ExpectedOutputs:
    """Run both on the probes, until there are enough output values; ``simulator`` may be ``float_component``."""
    reference = _compute_outputs(float_component, probes)
    used = probes[: len(reference)]
    return ExpectedOutputs(
        used, reference, reference if simulator is float_component else _compute_outputs(simulator, used)
    )


def measure_parity(expected: ExpectedOutputs, session: Session) -> Parity:
    """Run the engine on the same probes."""
    engine = [next(iter(session.run(feeds).values())) for feeds in expected.probes]
    reference, simulator, engine_output = (
        np.concatenate(outputs) for outputs in (expected.reference, expected.simulator, engine)
    )
    return Parity(sqnr_db(simulator, engine_output), sqnr_db(reference, simulator), sqnr_db(reference, engine_output))


def _compute_outputs(component: nn.Module, probes: Probes) -> list[NDArray[np.float32]]:
    """Outputs for the first probes, as many as give MIN_VALUES."""
    outputs: list[NDArray[np.float32]] = []
    with torch.no_grad():
        for feeds in probes:
            if sum(output.size for output in outputs) >= MIN_VALUES:
                break
            outputs.append(component(**{name: torch.from_numpy(np.asarray(x)) for name, x in feeds.items()}).numpy())
    return outputs
