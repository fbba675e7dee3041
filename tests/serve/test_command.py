"""`qdeploy serve` as a process: it says where it is, stops when told, and refuses what it cannot serve."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import pytest
from click.testing import CliRunner

from qdeploy.base.errors import UsageError
from qdeploy.cli import main
from qdeploy.serve.loading import name_bundles
from tests.serve.stand_in import WAIT_S, wait_until

LIFE_S = 300  # of a process that imports and loads on a busy machine, and is then tried
BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir"}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
from qdeploy.cli import main
main(sys.argv[1:])
"""


@contextmanager
def run_serve(
    *arguments: object, errors: IO[str] | int = subprocess.PIPE, **environment: str
) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command in a process without torch, and the address that it prints.

    errors: a file for its log, which a pipe that nobody reads would not hold when it is asked often.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, "serve", *map(str, arguments), "--port", "0"], text=True,
        stdout=subprocess.PIPE, stderr=errors, env=os.environ | {"PYTHONPATH": os.getcwd(), **environment},
    )  # fmt: skip
    guard = threading.Timer(LIFE_S, process.kill)
    guard.start()
    try:
        line = process.stdout.readline()  # type: ignore[union-attr]
        assert line.startswith("serving at http://127.0.0.1:"), process.communicate()[1]
        yield process, line.split()[-1]
    finally:
        guard.cancel()
        process.kill()
        if not process.stdout.closed:  # type: ignore[union-attr]
            process.communicate()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_it_finish_and_exit(float_bundle: Path, stop: signal.Signals) -> None:
    with run_serve(f"tiny={float_bundle}", "--threads", 1) as (process, url):
        answers: list[httpx.Response] = []
        body = {"prompt": "my secret wish, too long to be read", "num_inference_steps": 100, "model": "tiny"}
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(url + "v1/images/generations", json=body, timeout=WAIT_S))
        )
        asking.start()
        wait_until(lambda: "qdeploy_running_orders 1.0" in httpx.get(url + "metrics", timeout=WAIT_S).text)
        process.send_signal(stop)
        asking.join(WAIT_S)
        _, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, errors
        assert [answer.status_code for answer in answers] == [200]
    lines = [json.loads(line) for line in errors.splitlines()]  # all of the log is JSON
    (line,) = [line for line in lines if line.get("route") == "/v1/images/generations"]
    assert (line["status"], line["steps"], line["level"]) == (200, 100, "info")
    assert "secret" not in errors


def test_a_key_from_the_environment(float_bundle: Path) -> None:
    with run_serve(float_bundle, QDEPLOY_API_KEY="s3cret") as (_, url):
        assert httpx.get(url + "v1/models", timeout=WAIT_S).status_code == 401
        listed = httpx.get(url + "v1/models", headers={"Authorization": "Bearer s3cret"}, timeout=WAIT_S).json()
        assert [model["id"] for model in listed["data"]] == [float_bundle.name]
        assert httpx.get(url + "v1/models", headers={"Host": "evil.example"}, timeout=WAIT_S).status_code == 403


def test_names_of_bundles(tmp_path: Path) -> None:
    for name in ("a", "b", "c d", "x=y"):
        (tmp_path / name).mkdir()
    assert name_bundles([str(tmp_path / "a"), f"other={tmp_path / 'b'}"]) == {
        "a": tmp_path / "a", "other": tmp_path / "b",
    }  # fmt: skip
    assert name_bundles([f"n={tmp_path / 'x=y'}"]) == {"n": tmp_path / "x=y"}
    with pytest.raises(UsageError, match="is called 'a' too; give one of them as NAME="):
        name_bundles([str(tmp_path / "a"), f"a={tmp_path / 'b'}"])
    with pytest.raises(UsageError, match="got the name 'c d', expected letters"):
        name_bundles([str(tmp_path / "c d")])


def test_what_cannot_be_served(float_bundle: Path, tmp_path: Path) -> None:
    def refuse(*arguments: object) -> str:
        result = CliRunner().invoke(main, ["serve", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code != 0, result.output
        return " ".join(result.output.split())

    assert "is not a qdeploy bundle" in refuse(tmp_path)
    assert "--memory-gb: got 1e-06, expected at least" in refuse(float_bundle, "--memory-gb", "0.000001")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "nothing can listen there" in refuse(float_bundle, "--port", taken.getsockname()[1])
