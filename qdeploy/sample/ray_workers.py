"""A job's pictures made by the workers of a Ray cluster, and written here.

A picture depends on its number, not on who makes it, so neither the number of workers nor a lost one changes
any: another worker makes its batch again. Every machine needs qdeploy and the bundle at the same path; its hashes are
checked there. Different processors may round the last bits differently.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from qdeploy.artifacts.same_bundle import check_same_bundle
from qdeploy.base.errors import EngineError, QdeployError
from qdeploy.base.progress import OnProgress
from qdeploy.base.ray_cluster import LOCAL, connect_cluster
from qdeploy.runtime.pipeline import Pipeline, load
from qdeploy.sample.job import SampleJob
from qdeploy.sample.work import STEP_NAME, Workers, render_batch

RETRIES = 4  # of a batch whose worker died: a bundle that kills every worker must not be retried for ever
BATCHES_AHEAD = 2  # batches submitted for each processor, so that none is idle


def make_ray_workers(address: str = LOCAL) -> Workers:
    """Workers of the cluster at ``address``, as ``ray.init`` takes it, or of one started here meanwhile."""

    def make(job: SampleJob, batches: Sequence[range], on_progress: OnProgress) -> Iterator[tuple[int, bytes]]:
        with connect_cluster(address) as ray:
            threads = job.threads or 1
            task = ray.remote(num_cpus=threads, max_retries=RETRIES)(render_on_worker)
            limit = BATCHES_AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
            waiting, done = iter(batches), 0
            running: dict[Any, range] = {}
            while True:
                running |= {task.remote(job, batch): batch for batch in islice(waiting, limit - len(running))}
                if not running:
                    return
                for reference in ray.wait(list(running))[0]:
                    batch = running.pop(reference)
                    yield from zip(batch, fetch_result(ray, reference), strict=True)
                    done += len(batch)
                    on_progress(f"{STEP_NAME}: pictures on Ray", done, sum(map(len, batches)))

    return make


def render_on_worker(job: SampleJob, batch: range) -> list[bytes]:
    """What a worker runs; its pipeline stays loaded for the next batch."""
    return render_batch(load_pipeline(job), job, batch)


@functools.lru_cache(maxsize=1)
def load_pipeline(job: SampleJob) -> Pipeline:
    """The job's bundle, checked to be the one that the job was made for."""
    check_same_bundle(job.bundle, job.bundle_sha256)
    return load(job.bundle, engine=job.engine, threads=job.threads or 1)


def fetch_result(ray: Any, reference: Any) -> list[bytes]:
    """A task's pictures; its own error, or EngineError when its workers died."""
    try:
        return list(ray.get(reference))
    except ray.exceptions.RayTaskError as exc:
        if isinstance(exc.cause, QdeployError):
            raise exc.cause from exc
        raise
    except ray.exceptions.RayError as exc:
        raise EngineError(
            f"a batch was given up after {1 + RETRIES} workers died on it ({str(exc).splitlines()[0]}); pictures "
            "made so far are kept: look for memory or a broken bundle, then run the same command again"
        ) from exc
