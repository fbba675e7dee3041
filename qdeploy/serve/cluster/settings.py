"""How many replicas a bundle has, what each takes of its machine, and how Ray Serve changes their number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qdeploy.base.errors import UsageError
from qdeploy.base.ray_cluster import LOCAL


@dataclass(frozen=True)
class ReplicaSettings:
    """Replicas of each bundle, on a Ray cluster.

    address: of the cluster, as ``ray.init`` takes it; LOCAL starts one on this machine.
    least, most: replicas of a bundle; where they differ, Ray Serve changes their number with the orders that wait.
    target: orders that each replica makes or that wait for it, which Ray Serve aims at.
    runners: pictures that a replica makes at once.
    gpus: of a replica; several may share one, as in 0.5.
    """

    address: str = LOCAL
    least: int = 1
    most: int = 1
    target: float = 2.0
    runners: int = 1
    gpus: float = 0.0

    @property
    def is_autoscaled(self) -> bool:
        """Whether Ray Serve changes their number."""
        return self.least < self.most

    @property
    def senders(self) -> int:
        """Orders of a bundle that leave the queue here at once.

        As many as the replicas make; more of them where Ray Serve is to see that some wait, and start replicas.
        """
        return math.ceil(self.most * (max(self.runners, self.target) if self.is_autoscaled else self.runners))


def choose_replicas(replicas: int | None, least: int | None, most: int | None) -> tuple[int, int]:
    """The least and the most replicas, of --replicas, --min-replicas and --max-replicas; UsageError."""
    if replicas is not None:
        if least is not None or most is not None:
            raise UsageError("--replicas says how many there always are; leave out --min-replicas and --max-replicas")
        return replicas, replicas
    low = 1 if least is None else least
    high = max(1, low) if most is None else most
    if low > high:
        raise UsageError(f"--min-replicas: got {low}, expected at most the {high} of --max-replicas")
    return low, high
