"""Check that the engine agrees with the simulator: both, and the float model, run on the table's recorded inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qdeploy.base.errors import ParityError
from qdeploy.base.numerics import sqnr_db
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.engines.base import Session
from qdeploy.models.components import TorchComponent
from qdeploy.simulate.compare import Outputs, Probes, compute_both, join_calls
from qdeploy.targets.base import ParityLimits

# The absolute side. An output of zeros is at 0 dB, an unrelated one of the same power at -3: below the floor the error
# is more than half of the output's power, whatever the table says of itself.
QUALITY_FLOOR_DB = 3.0
# What a target may lose against the table's own simulation, which has neither signed codes nor a Q after convolutions:
# that Q by itself cost 12 dB in a UNet of random weights.
TARGET_LOSS_MAX_DB = 20.0
CLEAR_DB = 60.0  # a component that had more was hardly quantized; it is not held to that


def choose_least_sqnr(recorded_db: float | None, requested_db: float | None) -> float:
    """Least SQNR in dB of a component that is exported: the user's, or by what the table's own probes gave."""
    if requested_db is not None:
        return requested_db
    recorded = -math.inf if recorded_db is None else min(recorded_db, CLEAR_DB)
    return max(QUALITY_FLOOR_DB, recorded - TARGET_LOSS_MAX_DB)


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

    def check_quality(self, component: str, least_db: float) -> None:
        """ParityError when the table itself is too far from the float model (NaN counts as too far)."""
        if not self.simulator_db >= least_db:
            raise ParityError(
                f"{component}: as the table says it, its output is {self.simulator_db:.1f} dB from the float model's, "
                f"expected at least {least_db:.1f} dB. The table is broken or too coarse: quantize again, with more "
                f"bits or --adaround, or export it as it is with --min-sqnr {min(0.0, self.simulator_db) - 1:.0f}"
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
    reference: Sequence[Outputs]
    simulator: Sequence[Outputs]


def compute_expected(
    float_component: TorchComponent,
    simulator: TorchComponent,
    probes: Probes,
    on_progress: OnProgress = ignore_progress,
    name: str = "component",
) -> ExpectedOutputs:
    """Run both on the probes, until there are enough output values; ``simulator`` may be ``float_component``."""
    reference, simulated = compute_both(float_component, simulator, probes, on_progress, name)
    return ExpectedOutputs(probes[: len(reference)], reference, simulated)


def measure_parities(
    expected: ExpectedOutputs, session: Session, on_progress: OnProgress = ignore_progress, name: str = "component"
) -> list[Parity]:
    """Run the engine on the same probes; one figure for each of the component's outputs, in their order."""
    engine: list[Outputs] = []
    for feeds in expected.probes:
        engine.append(tuple(session.run(feeds).values()))
        on_progress(f"{name}: engine", len(engine), len(expected.probes))
    joined = zip(*map(join_calls, (expected.reference, expected.simulator, engine)), strict=True)
    return [
        Parity(sqnr_db(simulator, output), sqnr_db(reference, simulator), sqnr_db(reference, output))
        for reference, simulator, output in joined
    ]
