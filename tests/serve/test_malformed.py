"""Hundreds of malformed requests: each is answered with 4xx that names the field, and the service goes on as before."""

from __future__ import annotations

import logging

import pytest

from qdeploy.serve.service import ServiceSettings
from qdeploy.serve.web.settings import Limits, WebSettings
from tests.serve.malformed import GENERATIONS, Malformed, list_malformed
from tests.serve.running import Running, run_bundles

LEAST = 200
SHOWN = 2_000  # characters of an answer, which must not give back what came


@pytest.fixture(scope="module")
def strict(open_bundle, float_bundle):  # noqa: ANN001, ANN201
    limits = Limits(body_bytes=2**20)
    settings = ServiceSettings(threads=1, web=WebSettings(limits=limits))
    with run_bundles({"tiny": open_bundle, "fp32": float_bundle}, settings) as running:
        yield running


def send(running: Running, request: Malformed):  # noqa: ANN201
    return running.client.request(request.method, request.path, content=request.content, headers=request.headers)


def test_there_are_enough_and_none_twice() -> None:
    names = [request.name for request in list_malformed()]
    assert len(names) >= LEAST
    assert len(names) == len(set(names))


def test_each_is_refused_by_its_field(strict: Running, caplog: pytest.LogCaptureFixture) -> None:
    faults = []
    with caplog.at_level(logging.WARNING):
        for request in list_malformed():
            answer = send(strict, request)
            error = answer.json().get("error", {}) if answer.headers.get("content-type") == "application/json" else {}
            named = not request.fields or any(name in (error.get("param") or "") for name in request.fields)
            message = str(error.get("message"))
            if answer.status_code not in request.statuses or not named or len(answer.text) > SHOWN:
                faults.append(f"{request.name}: {answer.status_code} {answer.text[:300]}")
            if any(words in message for words in ("Traceback", "/root", "/home", "site-packages", 'File "')):
                faults.append(f"{request.name} tells too much: {message}")
    assert not faults, f"{len(faults)} of {len(list_malformed())}:\n" + "\n".join(faults)
    assert "Traceback" not in caplog.text


def test_the_service_goes_on_after_them(strict: Running) -> None:
    for request in list_malformed()[::7]:
        send(strict, request)
    body = {"prompt": "a cat", "num_inference_steps": 2, "seed": 1}
    answer = strict.client.post(GENERATIONS, json=body)
    assert answer.status_code == 200
    assert strict.room.count_waiting("tiny") == 0
    wanted = 'qdeploy_requests_total{route="/v1/images/generations",status="5'
    assert wanted not in strict.client.get("/metrics").text
