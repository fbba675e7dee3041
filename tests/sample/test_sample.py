"""A picture depends only on its number, not on its batch or process; a dead worker loses nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qdeploy.artifacts.manifest import MANIFEST
from qdeploy.base.errors import BundleError, EngineError, EngineUnavailableError, RequestError, UsageError
from qdeploy.base.files import hash_file
from qdeploy.base.progress import ignore_progress
from qdeploy.base.ray_cluster import connect_cluster
from qdeploy.sample import ray_workers
from qdeploy.sample.folder import sample_to_folder
from qdeploy.sample.job import SampleJob
from qdeploy.sample.ray_workers import make_ray_workers
from qdeploy.sample.work import sample_locally

PROMPTS = ("a cat", "a red house", "rocket")
COUNT = 7


@pytest.fixture
def job(int8_bundle: Path) -> SampleJob:
    sha256 = hash_file(int8_bundle / MANIFEST)
    return SampleJob(int8_bundle, sha256, PROMPTS, steps=2, guidance_scale=1.0, seed=3, threads=1)


def make_pictures(job: SampleJob, folder: Path, count: int = COUNT, **options: object) -> dict[str, bytes]:
    sample_to_folder(job, count, folder / "pictures", folder / "receipts", **options)  # type: ignore[arg-type]
    return {path.name: path.read_bytes() for path in sorted((folder / "pictures").iterdir())}


def test_prompts_go_round_and_batches_change_no_picture(job: SampleJob, tmp_path: Path) -> None:
    pictures = make_pictures(job, tmp_path / "several")
    assert sorted(pictures) == [f"{number:06d}.png" for number in range(COUNT)]
    one = replace(job, prompts=PROMPTS[:1])
    single, batched = (make_pictures(one, tmp_path / str(batch), batch=batch) for batch in (1, 5))
    assert single == batched
    assert [pictures[name] == single[name] for name in sorted(single)] == [number % 3 == 0 for number in range(COUNT)]


def test_it_goes_on_and_starts_over_with_other_settings(job: SampleJob, tmp_path: Path) -> None:
    whole = make_pictures(job, tmp_path / "whole")
    first = make_pictures(job, tmp_path, count=2)
    kept = (tmp_path / "pictures" / "000000.png").stat().st_mtime_ns
    assert make_pictures(job, tmp_path) == whole
    assert (tmp_path / "pictures" / "000000.png").stat().st_mtime_ns == kept
    changed = make_pictures(replace(job, seed=4), tmp_path, count=2)
    assert sorted(changed) == sorted(first)
    assert all(changed[name] != first[name] for name in first)


def test_pictures_of_unknown_origin_are_not_removed(job: SampleJob, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "000000.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match="does not say how they were made"):
        make_pictures(job, tmp_path)
    assert (tmp_path / "pictures" / "000000.png").read_bytes() == b"mine"


def test_a_dead_cluster_is_named(job: SampleJob, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(EngineUnavailableError, match="no Ray cluster answers at auto"):
        make_pictures(job, tmp_path, workers=make_ray_workers("auto"))


@pytest.fixture(scope="module")
def workers_of_two() -> Iterator[None]:
    """A Ray cluster of two processors, for all tests of this file; the code under test connects to it."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        patch.setattr(ray, "init", lambda **_: None)
        stop = ray.shutdown
        patch.setattr(ray, "shutdown", lambda: None)
        try:
            yield
        finally:
            stop()


@pytest.mark.slow
def test_ray_makes_the_same_pictures_though_a_worker_dies(
    workers_of_two: None, job: SampleJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = dict(sample_locally(job, job.batches(range(COUNT), 1), ignore_progress))
    assert dict(make_ray_workers()(job, job.batches(range(COUNT), 1), ignore_progress)) == here
    scar, drawn = tmp_path / "a worker died", ray_workers.render_on_worker

    def dies_once(job: SampleJob, batch: range) -> list[bytes]:
        if 3 in batch and not scar.exists():
            scar.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return drawn(job, batch)

    monkeypatch.setattr(ray_workers, "render_on_worker", dies_once)
    pictures = make_pictures(job, tmp_path, workers=make_ray_workers())
    assert scar.exists()
    assert [pictures[f"{number:06d}.png"] for number in range(COUNT)] == [here[number] for number in range(COUNT)]


@pytest.mark.slow
def test_ray_workers_errors_are_ours(
    workers_of_two: None, job: SampleJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match="steps"):
        make_pictures(replace(job, steps=0), tmp_path / "steps", workers=make_ray_workers())
    with pytest.raises(BundleError, match="not the bundle to use"):
        make_pictures(replace(job, bundle_sha256="0" * 64), tmp_path / "other", workers=make_ray_workers())

    def dies(job: SampleJob, batch: range) -> list[bytes]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    monkeypatch.setattr(ray_workers, "render_on_worker", dies)
    monkeypatch.setattr(ray_workers, "RETRIES", 1)
    with pytest.raises(EngineError, match="given up after 2 workers died"):
        make_pictures(job, tmp_path / "dead", count=1, workers=make_ray_workers())


def test_without_ray_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(EngineUnavailableError, match=r"pip install 'qdeploy\[ray\]'"), connect_cluster("local"):
        pass
