"""Do the engine and the simulator agree? Both run on real inputs that the table carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qdeploy.engines.base import Session
from qdeploy.errors import ParityError
from qdeploy.numerics import sqnr_db

# Both sides do the same integer arithmetic; what is left is float rounding around the norms and the
# softmax. Where it moves no value across a rounding edge the two agree to 130 dB; in a deep UNet a few
# values move by one step (1/256 of the range), and that spreads: 40 dB and more. Saturating kernels
# (below 20 dB) or a wrong scale do not pass.
PARITY_MIN_DB = 30.0


def parity_db(simulator: nn.Module, session: Session, probes: Sequence[Mapping[str, NDArray]]) -> float:
    """SQNR in dB of the engine's output against the simulator's, over all ``probes``."""
    expected, found = [], []
    for feeds in probes:
        with torch.no_grad():
            expected.append(simulator(**{name: torch.from_numpy(np.asarray(x)) for name, x in feeds.items()}).numpy())
        (output,) = session.run(feeds).values()
        found.append(output)
    return sqnr_db(np.concatenate(expected), np.concatenate(found))


def check_parity(component: str, measured_db: float) -> None:
    """ParityError when the two differ by more than rounding explains (NaN counts as differing)."""
    if not measured_db >= PARITY_MIN_DB:
        raise ParityError(
            f"{component}: the engine's output differs from the simulator's, SQNR {measured_db:.1f} dB, expected at "
            f"least {PARITY_MIN_DB:.0f} dB; the engine computes something other than the table says"
        )
