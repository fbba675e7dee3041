"""Ray Serve with real processes: two replicas under load of which one is killed, a bundle that changes, and the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serve.stand_in import wait_until
from tests.serve.test_command import run_serve

pytestmark = pytest.mark.slow
CLIENTS = 4
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
LONG_S = 120  # for processes that import and load on a busy machine
BODY = {"prompt": "a cat", "num_inference_steps": 150, "model": "a"}


@pytest.fixture
def folder(float_bundle: Path, tmp_path: Path) -> Path:
    pytest.importorskip("ray.serve", reason="needs qdeploy[serve-ray]")
    return Path(shutil.copytree(float_bundle, tmp_path / "a"))


@contextmanager
def run_on_ray(folder: Path, *options: object) -> Iterator[tuple[subprocess.Popen, str]]:
    """The door's process and its address; its log goes to a file next to the folder."""
    with (
        (folder.parent / "log").open("w") as log,
        run_serve(f"a={folder}", *options, "--queue", 64, "--ray=local", errors=log) as running,
    ):
        yield running


def read_log(folder: Path) -> str:
    return (folder.parent / "log").read_text()


@pytest.fixture
def service(folder: Path) -> Iterator[tuple[int, str]]:
    """The door's process and its address."""
    with run_on_ray(folder, "--replicas", 2) as (process, url):
        yield process.pid, url


def list_replicas(door: int) -> list[psutil.Process]:
    """Processes of the service's replicas, which Ray names."""
    return [one for one in psutil.Process(door).children(recursive=True) if is_replica(one)]


def is_replica(process: psutil.Process) -> bool:
    try:
        return "ray::ServeReplica:qdeploy-a" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def ask(url: str, seed: int, **more: object) -> httpx.Response:
    return httpx.post(url + "v1/images/generations", json={**BODY, "seed": seed, **more}, timeout=LONG_S)


def count_orders(url: str) -> float:
    lines = read_metrics(url).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("qdeploy_orders_total"))


def read_metrics(url: str) -> str:
    return httpx.get(url + "metrics", timeout=LONG_S).text


@contextmanager
def keep_asking(url: str) -> Iterator[Counter[tuple[int, int, str]]]:
    """Clients that ask while inside; (client, status, picture) of all answers, counted, once it is left."""
    is_over, answers = threading.Event(), Counter[tuple[int, int, str]]()

    def ask_again(seed: int) -> list[tuple[int, int, str]]:
        got = []
        while not is_over.is_set():
            answer = ask(url, seed)
            got.append((seed, answer.status_code, read_picture(answer)))
        return got

    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask_again, seed) for seed in range(CLIENTS)]
        try:
            yield answers
        finally:
            is_over.set()
            for one in asking:
                answers.update(one.result())


def read_picture(answer: httpx.Response) -> str:
    """The picture, or why there is none."""
    return str(answer.json()["data"][0]["b64_json"]) if answer.status_code == 200 else answer.text


def wait_long(condition: Callable[[], bool]) -> None:
    """Look each second until it holds: for processes that start on a busy machine."""
    waiting = threading.Event()
    for _ in range(LONG_S):
        if condition():
            return
        waiting.wait(1)
    raise AssertionError("it has not happened")


def test_a_killed_replica_loses_no_request(service: tuple[int, str]) -> None:
    door, url = service
    expected = {(seed, 200, read_picture(ask(url, seed))) for seed in range(CLIENTS)}
    with keep_asking(url) as answers:
        for _ in range(2):  # one after the other, so both of those that were there at first
            before = list_replicas(door)
            assert len(before) == 2
            for is_killed in (False, True):
                if is_killed:
                    before[0].send_signal(signal.SIGKILL)
                counted = count_orders(url)
                wait_long(lambda counted=counted: count_orders(url) > counted + CLIENTS)
            wait_long(lambda before=before: len(list_replicas(door)) == 2 and before[0] not in list_replicas(door))
    assert set(answers) == expected
    assert answers.total() > 4 * CLIENTS


def test_nothing_listens_to_the_network(service: tuple[int, str]) -> None:
    door, url = service
    assert ask(url, 1, num_inference_steps=2).status_code == 200
    everybody = [psutil.Process(door), *psutil.Process(door).children(recursive=True)]
    open_to_others = [
        (process.name(), connection.laddr)
        for process in everybody
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip not in LOOPBACK
    ]
    assert not open_to_others


def test_a_new_export_is_rolled_out_and_no_request_fails(
    service: tuple[int, str], folder: Path, int8_bundle: Path
) -> None:
    _, url = service
    before = read_picture(ask(url, 3))
    with keep_asking(url) as answers:
        new = Path(shutil.copytree(int8_bundle, folder.with_name("new")))
        folder.rename(folder.with_name("old"))
        new.rename(folder)
        wait_long(lambda: 'qdeploy_reloads_total{model="a",result="loaded"} 1.0' in read_metrics(url))
        after = read_picture(ask(url, 3))
    assert {status for _, status, _ in answers} == {200}
    assert {picture for seed, _, picture in answers if seed == 3} <= {before, after}
    assert after != before


def test_a_signal_finishes_what_is_asked_for_and_leaves_no_process(folder: Path) -> None:
    with run_on_ray(folder, "--replicas", 1) as (process, url):
        ours = psutil.Process(process.pid).children(recursive=True)
        assert len(ours) > 3
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, url, 1)
            wait_until(lambda: "qdeploy_running_orders 1.0" in read_metrics(url))
            os.kill(process.pid, signal.SIGTERM)
            assert answer.result().status_code == 200
        assert process.wait(LONG_S) == 0, read_log(folder)
    assert all(line.startswith("{") for line in read_log(folder).splitlines()), read_log(folder)
    _, left = psutil.wait_procs(ours, timeout=LONG_S)
    assert not left


def test_a_bundle_that_a_replica_cannot_load(folder: Path) -> None:
    graph = folder / "unet" / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1  # of a weight: the door reads what the graph says of itself, a replica checks the hash
    graph.write_bytes(data)
    with pytest.raises(AssertionError), run_on_ray(folder):
        pass
    assert "a: its replicas on Ray do not start" in read_log(folder)


def test_the_number_of_replicas_grows_with_the_queue(folder: Path) -> None:
    options = ("--min-replicas", 1, "--max-replicas", 2, "--replica-target", 1)
    with run_on_ray(folder, *options) as (process, url):
        assert len(list_replicas(process.pid)) == 1
        with keep_asking(url) as answers:
            wait_long(lambda: len(list_replicas(process.pid)) == 2)
    assert {status for _, status, _ in answers} == {200}


def test_a_bundle_that_nobody_asks_for_takes_no_process(folder: Path) -> None:
    with run_on_ray(folder, "--min-replicas", 0) as (process, url):
        assert list_replicas(process.pid) == []
        assert ask(url, 1).status_code == 200
        assert len(list_replicas(process.pid)) == 1
        wait_long(lambda: not list_replicas(process.pid))
        assert ask(url, 1).status_code == 200


def test_the_example(folder: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "ray_serve.py"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with (
        (folder.parent / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, example, folder, "0"], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as process,
    ):
        try:
            line = process.stdout.readline()  # type: ignore[union-attr]
            assert line.startswith("serving at http://127.0.0.1:"), read_log(folder)
            assert ask(line.split()[-1], 1, model="bundle").status_code == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(LONG_S) == 0, read_log(folder)
        finally:
            process.kill()
