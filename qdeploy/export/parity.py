"""Does the engine compute what the simulator says? Both, and the float model, run on the table's recorded inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qdeploy.engines.base import Session
from qdeploy.errors import ParityError
from qdeploy.numerics import sqnr_db

Probes = Sequence[Mapping[str, NDArray]]

# Both do the same integer arithmetic; float rounding in norms and softmax (1e-6) now and then moves a
# value across a rounding edge, by one of 256 steps. Layer by layer that spreads: 130 dB in a shallow
# encoder, but in a deep UNet the two end up almost as far apart as either is from the float model.
# So the yardstick is the quantization noise itself. Two *unrelated* roundings of one model would lie
# 3 dB beyond it; a saturating kernel or a wrong scale costs the engine far more than half a dB.
BETWEEN_SLACK_DB = 1.0
ENGINE_LOSS_MAX_DB = 0.5
# With fp16 around the integers, constants of 11 bits flip some codes at the edges in the first layer
# already: the same noise drawn again. On a tiny text encoder's few values it varied by 0.7 dB.
FP16_ENGINE_LOSS_MAX_DB = 1.5
FP16_MIN_DB = 40.0  # rounding constants to 11 bits is 70 dB, of which a deep graph loses some; a wrong one costs all


@dataclass(frozen=True)
class Parity:
    """SQNR in dB over all probes: engine against simulator, and each of the two against the float model."""

    between_db: float
    simulator_db: float
    engine_db: float

    def check(self, component: str, loss_max_db: float = ENGINE_LOSS_MAX_DB) -> None:
        """ParityError when they differ by more than spread rounding explains (NaN counts as differing).

        loss_max_db: how much further from the float model the engine may be than the simulator.
        """
        agree = self.between_db >= self.simulator_db - BETWEEN_SLACK_DB
        no_worse = self.engine_db >= self.simulator_db - loss_max_db
        if not (agree and no_worse):
            raise ParityError(
                f"{component}: the engine does not compute what the table says. SQNR of engine against simulator "
                f"{self.between_db:.1f} dB, against the float model {self.engine_db:.1f} dB (engine) and "
                f"{self.simulator_db:.1f} dB (simulator); expected at least {self.simulator_db - BETWEEN_SLACK_DB:.1f} "
                f"and {self.simulator_db - loss_max_db:.1f} dB. Report the graph with this message"
            )

    def check_fp16(self, component: str) -> None:
        """ParityError when a float graph in fp16 is further from the float32 model than rounding explains."""
        if not self.engine_db >= FP16_MIN_DB:
            raise ParityError(
                f"{component}: in fp16 it is {self.engine_db:.1f} dB from the float32 model, expected at least "
                f"{FP16_MIN_DB:.0f} dB. Report the graph with this message"
            )


def measure_parity(float_component: nn.Module, simulator: nn.Module, session: Session, probes: Probes) -> Parity:
    """Run all three on every probe."""
    reference = _torch_outputs(float_component, probes)
    simulated = _torch_outputs(simulator, probes)
    engine = np.concatenate([next(iter(session.run(feeds).values())) for feeds in probes])
    return Parity(sqnr_db(simulated, engine), sqnr_db(reference, simulated), sqnr_db(reference, engine))


def _torch_outputs(component: nn.Module, probes: Probes) -> NDArray[np.float32]:
    with torch.no_grad():
        outputs = [
            component(**{name: torch.from_numpy(np.asarray(x)) for name, x in feeds.items()}) for feeds in probes
        ]
    return torch.cat(outputs).numpy()
