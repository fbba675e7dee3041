"""A job's pictures made by the workers of a Ray cluster, and written here.

A picture depends on its number, not on who makes it, so neither the number of workers nor one that dies changes
any: its batch is made again by another. Every machine needs qdeploy and the bundle at the same path; its hashes are
checked there. Unlike processors may round the last bits differently.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from qdeploy.bundle import MANIFEST
from qdeploy.errors import BundleError, EngineError, EngineUnavailableError, QdeployError
from qdeploy.files import sha256_of
from qdeploy.progress import OnProgress
from qdeploy.runtime.pipeline import Pipeline, load
from qdeploy.sample.job import Job
from qdeploy.sample.work import WHAT, Workers, drawn

LOCAL = "local"  # a cluster of this machine's own, gone when the work is done
RETRIES = 4  # of a batch whose worker died: a bundle that kills each must not do so for ever
AHEAD = 2  # batches under way for each processor, so that none waits for the next


def on_ray(address: str = LOCAL) -> Workers:
    """Workers of the cluster at ``address``, as ``ray.init`` takes it, or of one started here for the while."""

    def make(job: Job, batches: Sequence[range], on_progress: OnProgress) -> Iterator[tuple[int, bytes]]:
        with cluster(address) as ray:
            threads = job.threads or 1
            task = ray.remote(num_cpus=threads, max_retries=RETRIES)(drawn_by_worker)
            most = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
            waiting, done = iter(batches), 0
            running: dict[Any, range] = {}
            while True:
                running |= {task.remote(job, batch): batch for batch in islice(waiting, most - len(running))}
                if not running:
                    return
                for reference in ray.wait(list(running))[0]:
                    batch = running.pop(reference)
                    yield from zip(batch, result_of(ray, reference), strict=True)
                    done += len(batch)
                    on_progress(f"{WHAT}: pictures on Ray", done, sum(map(len, batches)))

    return make


def drawn_by_worker(job: Job, batch: range) -> list[bytes]:
    """What a worker runs; its pipeline stays loaded for the next batch."""
    return drawn(pipeline_of(job), job, batch)


@functools.lru_cache(maxsize=1)
def pipeline_of(job: Job) -> Pipeline:
    """The job's bundle, checked to be the one that the job was made for."""
    if not (job.bundle / MANIFEST).is_file() or sha256_of(job.bundle / MANIFEST) != job.bundle_sha256:
        raise BundleError(
            f"{job.bundle} on {platform.node()} is not the bundle to sample; put the same one at that path on "
            "every machine of the cluster, for instance on a shared disk"
        )
    return load(job.bundle, engine=job.engine, threads=job.threads or 1)


def result_of(ray: Any, reference: Any) -> list[bytes]:
    """A task's pictures; its own error, or EngineError when no worker lived to finish it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as exc:
        if isinstance(exc.cause, QdeployError):
            raise exc.cause from exc
        raise
    except ray.exceptions.RayError as exc:
        raise EngineError(
            f"a batch was given up after {1 + RETRIES} workers died over it ({str(exc).splitlines()[0]}); pictures "
            "made so far are kept: look for memory or a broken bundle, then run the same command again"
        ) from exc


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """The ``ray`` module, connected; EngineUnavailableError where it is not installed or nothing answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise a new cluster reports its use to Ray's makers
    try:
        import ray
    except ModuleNotFoundError as exc:
        raise EngineUnavailableError("--ray needs Ray; run `pip install 'qdeploy[ray]'`") from exc
    where: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **where)
    except (ConnectionError, ValueError, RuntimeError) as exc:
        raise EngineUnavailableError(
            f"no Ray cluster answers at {address} ({exc}); start one with `ray start --head`, or give --ray alone for "
            "one of this machine's own"
        ) from exc
    try:
        yield ray
    finally:
        ray.shutdown()
