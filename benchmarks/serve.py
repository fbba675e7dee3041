"""What the service costs and how it holds: `python -m benchmarks.serve BUNDLE`.

Overhead of one client and throughput of four compared with direct calls, in turns; latencies with a full queue; and
memory over many mixed requests. The service is a process of its own, as in use; take figures on an idle machine.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import httpx
import numpy as np
from numpy.typing import NDArray

import qdeploy
from benchmarks.serve_requests import GENERATIONS, SETTINGS, Service, run_service, send_mixed
from qdeploy.base.files import stage_file
from qdeploy.commands import PATH, Whole
from qdeploy.reporting.environment import describe_environment
from qdeploy.runtime.pipeline import Pipeline

CLIENTS = 4
WARMUPS = 2
RATE_ROUNDS = 3  # of both throughputs, in turns
WARMUP_REQUESTS = 200  # of mixed ones, before memory is read for the first time
TOO_MANY = 429


@dataclass(frozen=True)
class ServeFigures:
    """All figures of one bundle; times in milliseconds, medians unless they say otherwise.

    overhead: of one client's request over a direct call in the same round, as a share. throughput_ratio: pictures per
    second of four clients by those of four threads, of neighbouring measurements. bound_ms: the queue's pictures and
    the one that is being made times a picture's time. kept_bytes: of pictures that were
    asked for by URL meanwhile, which rss_growth leaves out. samples_ms: of both kinds of call, round by round.
    """

    direct_ms: float
    served_ms: float
    overhead: float
    direct_pictures_per_s: float
    served_pictures_per_s: float
    throughput_ratio: float
    full_queue_p99_ms: float
    bound_ms: float
    refused: int
    statuses: dict[str, int]
    rss_before_bytes: int
    rss_after_bytes: int
    kept_bytes: int
    rss_growth: float
    samples_ms: dict[str, list[float]]


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--steps", type=Whole(1, 1000), default=25, show_default=True, help="As the service's default.")
@click.option("--rounds", type=Whole(1, 1000), default=30, show_default=True, help="Pictures of each, in turns.")
@click.option("--threads", type=Whole(1, 1000), default=1, show_default=True, help="Of one call.")
@click.option("--runners", type=Whole(1, 1000), default=CLIENTS, show_default=True, help="Of the service.")
@click.option("--queue", type=Whole(1, 1000), default=16, show_default=True)
@click.option("--requests", type=Whole(1, 10**6), default=10_000, show_default=True, help="Mixed ones.")
@click.option("--json", "out", type=PATH, help="Write the figures to this file too.")
def main(
    bundle: Path, steps: int, rounds: int, threads: int, runners: int, queue: int, requests: int, out: Path | None
) -> None:
    """Measure a service of BUNDLE next to direct calls."""
    settings = SETTINGS | {"num_inference_steps": steps}
    with qdeploy.load(bundle, threads=threads) as pipe, run_service(bundle, threads, runners, queue) as service:
        figures = measure(pipe, service, settings, rounds, queue, requests)
    document = {
        "steps": steps,
        "rounds": rounds,
        "runners": runners,
        "queue": queue,
        "figures": asdict(figures),
        "environment": describe_environment([pipe.bundle.manifest.engine], threads),
    }
    if out is not None:
        with stage_file(out) as scratch:
            scratch.write_text(json.dumps(document, indent=1), encoding="utf-8")
    for name, value in asdict(figures).items():
        if name != "samples_ms":
            click.echo(f"{name}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value}")


def measure(
    pipe: Pipeline, service: Service, settings: dict[str, object], rounds: int, queue: int, requests: int
) -> ServeFigures:
    """Everything, one after another."""

    def call_directly() -> None:
        pipe("a cat", steps=int(str(settings["num_inference_steps"])), seed=1)

    def ask() -> None:
        status = service.ask(settings)
        assert status == httpx.codes.OK, status

    samples = time_in_turns(call_directly, ask, rounds)
    direct_ms, served_ms = map(float, np.median(samples, axis=1))
    overhead = float(np.median(samples[1] / samples[0])) - 1
    rates = [(measure_rate(call_directly, rounds), measure_rate(ask, rounds)) for _ in range(RATE_ROUNDS)]
    direct_rate, served_rate = map(float, np.median(rates, axis=0))
    ratio = float(np.median([served / direct for direct, served in rates]))
    latencies_ms, refused = fill_queue(service, settings, queue)
    send_mixed(service, WARMUP_REQUESTS)
    before, kept_before = service.read_rss_bytes(), service.read_kept_bytes()
    statuses = send_mixed(service, requests)
    after, kept = service.read_rss_bytes(), service.read_kept_bytes() - kept_before
    return ServeFigures(
        direct_ms, served_ms, overhead, direct_rate, served_rate, ratio,
        float(np.percentile(latencies_ms, 99)), (queue + 1) * direct_ms, refused, dict(statuses), before, after,
        kept, (after - kept) / before - 1, {"direct": samples[0].tolist(), "served": samples[1].tolist()},
    )  # fmt: skip


def time_in_turns(first: Callable[[], None], second: Callable[[], None], rounds: int) -> NDArray[np.float64]:
    """Milliseconds ``float64[2, rounds]`` of both, one after the other in each round."""
    samples: tuple[list[float], list[float]] = ([], [])
    for number in range(WARMUPS + rounds):
        for work, spent in zip((first, second), samples, strict=True):
            start = time.perf_counter()
            work()
            if number >= WARMUPS:
                spent.append((time.perf_counter() - start) * 1e3)
    return np.array(samples)


def measure_rate(work: Callable[[], None], rounds: int) -> float:
    """Calls per second of four threads that each make ``rounds``."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        start = time.perf_counter()
        for done in [pool.submit(work) for _ in range(CLIENTS * rounds)]:
            done.result()
        return CLIENTS * rounds / (time.perf_counter() - start)


def fill_queue(service: Service, settings: dict[str, object], queue: int) -> tuple[list[float], int]:
    """Latencies in milliseconds of what was taken when twice as many ask as may wait, and how many were refused."""

    def ask(_: int) -> tuple[int, float]:
        with httpx.Client(base_url=service.url, timeout=None) as client:
            start = time.perf_counter()
            status = client.post(GENERATIONS, json=settings).status_code
            return status, (time.perf_counter() - start) * 1e3

    with ThreadPoolExecutor(2 * queue) as pool:
        answers = list(pool.map(ask, range(2 * queue)))
    counts = Counter(status for status, _ in answers)
    return [spent for status, spent in answers if status == httpx.codes.OK], counts[TOO_MANY]


if __name__ == "__main__":
    main()
