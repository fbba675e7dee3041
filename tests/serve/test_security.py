"""Who may ask, from where and how much; and what errors do not tell."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import httpx
import pytest
from PIL import Image

from qdeploy.serve.service import choose_hosts
from qdeploy.serve.web.guard import has_key, strip_port
from qdeploy.serve.web.settings import Limits, WebSettings
from tests.serve.running import run_stand_in
from tests.serve.stand_in import StandInMaker

PATH = "/v1/images/generations"
BODY = {"prompt": "a cat", "num_inference_steps": 2}


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"user:{password}".encode()).decode()


def test_a_key_is_asked_for(float_bundle: Path) -> None:
    with run_stand_in(float_bundle, StandInMaker(is_free=True), WebSettings(api_key="s3cret")) as running:
        for given in (
            None,
            "Bearer",
            "Bearer s3cre",
            "Bearer s3cret2",
            "bearer \x80",
            "Token s3cret",
            basic("x"),
            "Basic ?",
        ):
            headers = {} if given is None else {"Authorization": given.encode("latin-1")}
            refused = running.client.post(PATH, json=BODY, headers=headers)
            assert refused.status_code == 401, given
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert "s3cret" not in refused.text
        for path in ("/metrics", "/v1/models", "/sdapi/v1/options"):
            assert running.client.get(path).status_code == 401
        for path in ("/healthz", "/readyz"):
            assert running.client.get(path).status_code == 200
        for given in ("Bearer s3cret", "bearer s3cret", basic("s3cret")):
            assert running.client.post(PATH, json=BODY, headers={"Authorization": given}).status_code == 200


def test_a_key_beyond_ascii() -> None:
    from starlette.datastructures import Headers

    headers = Headers(raw=[(b"authorization", b"Basic " + base64.b64encode("u:schlüssel".encode()))])
    assert has_key(headers, "schlüssel")
    assert not has_key(headers, "schluessel")


def test_pages_of_other_sites_are_kept_out(float_bundle: Path) -> None:
    settings = WebSettings(hosts=choose_hosts("127.0.0.1", ()), origins=frozenset({"https://mine.example"}))
    with run_stand_in(float_bundle, StandInMaker(is_free=True), settings) as running:

        def ask(**headers: str) -> httpx.Response:
            return running.client.post(PATH, json=BODY, headers=headers)

        assert ask(Host="evil.example").status_code == 403  # a name that was made to lead here
        assert ask(Origin="https://evil.example").status_code == 403
        assert ask(Origin="null").status_code == 403
        assert ask(Origin=running.url).status_code == 200
        allowed = ask(Origin="https://mine.example")
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://mine.example")
        asked = {"Origin": "https://mine.example", "Access-Control-Request-Method": "POST"}
        assert running.client.options(PATH, headers=asked).status_code == 200


def test_no_site_is_allowed_by_default(float_bundle: Path) -> None:
    with run_stand_in(float_bundle, StandInMaker(is_free=True)) as running:
        answer = running.client.get("/v1/models", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "server" not in answer.headers


def test_limits_name_the_field(float_bundle: Path, encoder_bundle: Path) -> None:
    limits = Limits(steps=10, pictures=2, pixels=300, source_pixels=1000, body_bytes=20_000)
    with run_stand_in(encoder_bundle, StandInMaker(is_free=True), WebSettings(limits=limits)) as running:
        for body, param in (
            ({"num_inference_steps": 11}, "num_inference_steps"),
            ({"n": 3}, "n"),
            ({"size": "32x16"}, "size"),
            ({"prompt": "x" * 10_001}, "prompt"),
        ):
            refused = running.client.post(PATH, json={**BODY, **body})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text
        large = running.client.post(PATH, json={**BODY, "user": "x" * 30_000})
        assert (large.status_code, large.json()["error"]["param"]) == (413, "body")

        def send_in_pieces():  # noqa: ANN202
            yield from [b" " * 5_000] * 10

        unannounced = running.client.post(PATH, content=send_in_pieces(), headers={"Content-Type": "application/json"})
        assert (unannounced.status_code, unannounced.json()["error"]["param"]) == (413, "body")
        file = io.BytesIO()
        Image.new("RGB", (40, 40)).save(file, format="PNG")
        source = running.client.post("/v1/images/edits", files={"image": file.getvalue()}, data=BODY)
        assert (source.status_code, source.json()["error"]["param"]) == (400, "image")
        assert "more than the" in source.text


def test_no_path_is_told(encoder_bundle: Path) -> None:
    maker = StandInMaker(is_free=True)
    maker.fail_on = lambda arguments: OSError(2, "No such file", str(encoder_bundle / "unet"))
    with run_stand_in(encoder_bundle, maker) as running:
        refused = running.client.post(PATH, json=BODY)
        assert refused.status_code == 500
        assert str(encoder_bundle) not in refused.text
        for path in (
            "/pictures/../../etc/passwd",
            "/pictures/%2e%2e%2fmanifest.json",
            "/..%2f..%2fetc/passwd",
            "/v1/models/..%2f",
        ):
            answer = httpx.get(running.url + path)
            assert answer.status_code == 404, path
            assert str(encoder_bundle) not in answer.text


@pytest.mark.parametrize(
    ("host", "name"),
    [("localhost:80", "localhost"), ("[::1]:8000", "[::1]"), ("[::1]", "[::1]"), ("A.example", "a.example"), ("", "")],
)
def test_names_of_hosts(host: str, name: str) -> None:
    assert strip_port(host) == name


def test_only_a_local_service_is_choosy_about_names() -> None:
    assert choose_hosts("0.0.0.0", ()) is None
    assert "127.0.0.1" in (choose_hosts("127.0.0.1", ()) or ())
    assert "my.example" in (choose_hosts("0.0.0.0", ("my.example",)) or ())
