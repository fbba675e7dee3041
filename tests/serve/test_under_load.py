"""The service under load: full queues, clients that go away, deadlines and stopping; the tests release each step."""

from __future__ import annotations

import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from qdeploy.serve.web.settings import WebSettings
from tests.serve.running import Running, run_stand_in
from tests.serve.stand_in import WAIT_S, StandInMaker, wait_until

PATH = "/v1/images/generations"


def ask(running: Running, **body: object) -> httpx.Response:
    return running.client.post(PATH, json={"prompt": "a cat", "num_inference_steps": 2, **body})


def open_client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0)


def open_request(running: Running, body: dict) -> socket.socket:
    """A connection that has sent a request and reads nothing, as of a client that may go away."""
    host, port = running.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=WAIT_S)
    data = json.dumps({"prompt": "a cat", **body}).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


def read_metric(running: Running, line: str) -> float:
    shown = running.client.get("/metrics").text
    return sum(float(row.rpartition(" ")[2]) for row in shown.splitlines() if row.startswith(line))


def test_a_full_queue_is_429_with_retry_after(float_bundle: Path) -> None:
    maker = StandInMaker()
    with run_stand_in(float_bundle, maker, queue=1) as running, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, running)]
        wait_until(lambda: len(running.room.list_running()) == 1)
        waiting.append(pool.submit(ask, running))
        wait_until(lambda: running.room.count_waiting("a") == 1)
        refused = ask(running)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        with open_client(running) as client, pytest.raises(openai.RateLimitError):
            client.images.generate(prompt="a cat")
        assert read_metric(running, 'qdeploy_queue_pictures{model="a"}') == 1
        assert read_metric(running, "qdeploy_running_orders") == 1
        maker.steps.release(4)  # type: ignore[union-attr]
        assert [future.result(WAIT_S).status_code for future in waiting] == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_picture_within_a_step(float_bundle: Path, stream: bool) -> None:
    maker = StandInMaker()
    with run_stand_in(float_bundle, maker) as running:
        body = {"num_inference_steps": 100, "stream": stream}
        gone, waiting = open_request(running, body), None
        wait_until(lambda: len(running.room.list_running()) == 1)
        waiting = open_request(running, body)
        wait_until(lambda: running.room.count_waiting("a") == 1)
        maker.steps.release()  # type: ignore[union-attr]
        wait_until(lambda: maker.made == 1)
        waiting.close()
        wait_until(lambda: running.room.count_waiting("a") == 0)
        (ticket,) = running.room.list_running()
        gone.close()
        wait_until(lambda: ticket.outcome == "cancelled")
        made = maker.made
        maker.steps.release()  # type: ignore[union-attr]
        wait_until(lambda: not running.room.list_running())
        assert maker.made <= made + 1
        wait_until(lambda: read_metric(running, 'qdeploy_orders_total{model="a",outcome="cancelled"}') == 2)


def test_a_stream_that_is_not_read_to_its_end(float_bundle: Path) -> None:
    maker = StandInMaker()
    with run_stand_in(float_bundle, maker) as running:
        with open_client(running) as client:
            stream = client.images.generate(
                prompt="a cat", stream=True, partial_images=9, extra_body={"num_inference_steps": 100}
            )
            maker.steps.release(30)  # type: ignore[union-attr]
            assert next(iter(stream)).type == "image_generation.partial_image"
            (ticket,) = running.room.list_running()
            stream.close()  # type: ignore[attr-defined]
        wait_until(lambda: ticket.outcome == "cancelled")


def test_a_stream_that_nobody_begins_to_read(float_bundle: Path) -> None:
    """Its events are begun before the answer is, and dropping them ends the order."""
    maker = StandInMaker()
    with run_stand_in(float_bundle, maker) as running:
        for _ in range(5):
            open_request(running, {"num_inference_steps": 100, "stream": True, "partial_images": 3}).close()
        wait_until(lambda: read_metric(running, "qdeploy_requests_total") >= 5)
        maker.steps.release(10)  # type: ignore[union-attr]  # of 500
        wait_until(lambda: not running.room.list_running() and not running.room.count_waiting("a"))
        assert maker.made <= 10


def test_a_deadline_is_the_intended_503(float_bundle: Path) -> None:
    maker = StandInMaker()
    with run_stand_in(float_bundle, maker, WebSettings(timeout_s=0.2)) as running, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, running)
        refused = answer.result(WAIT_S)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "deadline")
        assert "deadline of 0.2 s has passed" in refused.json()["error"]["message"]


def test_an_error_within_a_stream_is_an_event(float_bundle: Path) -> None:
    maker = StandInMaker(is_free=True)
    maker.fail_on = lambda arguments: KeyError("/secret/place")
    with run_stand_in(float_bundle, maker) as running:
        with open_client(running) as client, pytest.raises(openai.APIError, match="has failed; its log says why"):
            list(client.images.generate(prompt="a cat", stream=True))
        refused = ask(running)
        assert refused.status_code == 500
        assert "secret" not in refused.text


def test_stopping_finishes_what_is_asked_for(float_bundle: Path) -> None:
    maker = StandInMaker()
    with run_stand_in(float_bundle, maker) as running, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, running) for _ in range(2)]
        wait_until(lambda: running.room.count_waiting("a") == 1)
        running.server.should_exit = True
        wait_until(lambda: not running.room.is_ready)
        maker.steps.release(4)  # type: ignore[union-attr]
        assert [answer.result(WAIT_S).status_code for answer in answers] == [200, 200]
        with pytest.raises(httpx.HTTPError):
            httpx.post(running.url + PATH, json={"prompt": "a cat"}, timeout=WAIT_S)


def test_stopping_refuses_what_takes_too_long(float_bundle: Path) -> None:
    maker = StandInMaker()
    with run_stand_in(float_bundle, maker, finish_s=0.1) as running, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, running) for _ in range(2)]
        wait_until(lambda: running.room.count_waiting("a") == 1)
        running.server.should_exit = True
        for answer in answers:
            refused = answer.result(WAIT_S)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
            assert "retry-after" in refused.headers


def test_health_and_readiness(float_bundle: Path) -> None:
    with run_stand_in(float_bundle, StandInMaker(is_free=True)) as running:
        assert running.client.get("/healthz").json() == {"status": "ok"}
        assert running.client.get("/readyz").status_code == 200
        running.room.stop()
        assert running.client.get("/healthz").status_code == 200
        assert running.client.get("/readyz").status_code == 503
        assert ask(running).status_code == 503


def test_metrics(float_bundle: Path) -> None:
    with run_stand_in(float_bundle, StandInMaker(is_free=True)) as running:
        assert ask(running, n=3).status_code == 200
        assert ask(running, size="1x1").status_code == 400
        running.client.get("/no/such/place")
        wait_until(lambda: read_metric(running, 'qdeploy_orders_total{model="a",outcome="made"}') == 1)
        for line, value in {
            'qdeploy_pictures_total{model="a"}': 3,
            'qdeploy_step_seconds_count{model="a"}': 2,
            'qdeploy_picture_seconds_count{model="a"}': 1,
            f'qdeploy_requests_total{{route="{PATH}",status="200"}}': 1,
            f'qdeploy_requests_total{{route="{PATH}",status="400"}}': 1,
            'qdeploy_requests_total{route="none",status="404"}': 1,
        }.items():
            assert read_metric(running, line) == value, line
        assert read_metric(running, "process_resident_memory_bytes") > 1e6
        assert read_metric(running, 'qdeploy_bundle_bytes{model="a"}') > 1000
        assert read_metric(running, "qdeploy_kept_picture_bytes") == 0
        kept = running.client.get(ask(running, response_format="url").json()["data"][0]["url"])
        assert read_metric(running, "qdeploy_kept_picture_bytes") == len(kept.content)


@pytest.mark.parametrize("log_prompts", [False, True])
def test_a_line_of_log_a_request(float_bundle: Path, caplog: pytest.LogCaptureFixture, log_prompts: bool) -> None:
    with caplog.at_level(logging.INFO, "qdeploy"):
        with run_stand_in(float_bundle, StandInMaker(is_free=True), WebSettings(log_prompts=log_prompts)) as running:
            answer = ask(running, prompt="my secret wish", seed=4)
            running.client.get("/healthz")
        lines = [json.loads(record.getMessage()) for record in caplog.records if record.name.endswith("access")]
    line = next(line for line in lines if line["route"] == PATH)
    assert line["id"] == answer.headers["x-request-id"]
    assert {"status": 200, "model": "a", "steps": 2, "seed": 4, "pictures": 1, "size": "16x16"}.items() <= line.items()
    assert ("my secret wish" in caplog.text) is log_prompts
    assert threading.active_count() < 100
