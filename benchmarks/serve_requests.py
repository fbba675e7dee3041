"""The service's process for ``benchmarks.serve``, and the mixed requests that it is asked."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import httpx

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
SETTINGS: dict[str, object] = {"prompt": "a cat", "seed": 1}
SENDERS = 8
GONE = "gone"  # what is counted for a client that goes away
RSS, KEPT = "process_resident_memory_bytes", "qdeploy_kept_picture_bytes"


@dataclass(frozen=True)
class Service:
    """A service that runs in a process of its own."""

    url: str
    client: httpx.Client
    local: threading.local = field(default_factory=threading.local)

    def ask(self, body: Mapping[str, object]) -> int:
        """The status of one request, by a client that costs little: a connection a thread, nothing parsed."""
        if not hasattr(self.local, "connection"):
            self.local.connection = HTTPConnection(urlsplit(self.url).netloc)
        connection: HTTPConnection = self.local.connection
        connection.request("POST", GENERATIONS, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return answer.status

    def read_rss_bytes(self) -> int:
        """Its resident memory."""
        return self._read_metric(RSS)

    def read_kept_bytes(self) -> int:
        """Pictures that it keeps for their URLs, for an hour and up to a bound."""
        return self._read_metric(KEPT)

    def _read_metric(self, name: str) -> int:
        lines = self.client.get("/metrics").text.splitlines()
        return int(float(next(line for line in lines if line.startswith(name)).split()[1]))


@contextmanager
def run_service(bundle: Path, threads: int, runners: int, queue: int) -> Iterator[Service]:
    """`qdeploy serve` on a free port, stopped at the end."""
    command = [sys.executable, "-m", "qdeploy.cli", "serve", f"bundle={bundle}", "--port", "0"]
    command += ["--threads", str(threads), "--runners", str(runners), "--queue", str(queue)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1].rstrip("/")
        with httpx.Client(base_url=url, timeout=None) as client:
            yield Service(url, client)
    finally:
        process.terminate()
        process.wait()


def send_mixed(service: Service, count: int) -> Counter[str]:
    """Answers by status to ``count`` requests: valid, broken, too large, and of clients that go away."""
    with ThreadPoolExecutor(SENDERS) as pool:
        return Counter(pool.map(lambda number: send_one(service, number), range(count)))


def send_one(service: Service, number: int) -> str:
    """The status of the answer to one request of the mixture, or that its client has gone."""
    body = SETTINGS | {"num_inference_steps": 2, "seed": number}
    kinds = (
        lambda: service.client.post(GENERATIONS, json=body),
        lambda: service.client.post(GENERATIONS, json=body | {"stream": True, "partial_images": 1}),
        lambda: service.client.post(GENERATIONS, json=body | {"response_format": "url", "output_format": "jpeg"}),
        lambda: service.client.post(GENERATIONS, json=body | {"size": "7x7"}),
        lambda: service.client.post(GENERATIONS, content=b"{" * 1000, headers={"Content-Type": "application/json"}),
        lambda: service.client.post(EDITS, files={"image": b"no picture"}, data={"prompt": "a cat"}),
    )
    place = number % (len(kinds) + 2)
    if place < len(kinds):
        return str(kinds[place]().status_code)
    return go_away(service, body) if place == len(kinds) else announce_too_much(service)


def go_away(service: Service, body: dict[str, object]) -> str:
    """Ask, and close the connection without reading."""
    data = json.dumps(body).encode()
    with open_connection(service, len(data)) as connection:
        connection.sendall(data)
    return GONE


def announce_too_much(service: Service) -> str:
    """Announce a body of a gigabyte; the status of the answer, which comes before any of it is sent."""
    with open_connection(service, 10**9) as connection:
        return connection.recv(64).split()[1].decode()


def open_connection(service: Service, length: int) -> socket.socket:
    """A connection that has sent the head of a request with a body of this length."""
    place = urlsplit(service.url)
    connection = socket.create_connection((str(place.hostname), int(place.port or 0)))
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
    return connection
