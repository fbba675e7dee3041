"""The door: who may ask, from where, and how many bytes. Everything else comes after it."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qdeploy.serve.web.failures import Failure
from qdeploy.serve.web.settings import WebSettings

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/favicon.ico"})  # without a key: nothing of anybody is in them
OPEN_PREFIX = "/pictures/"  # whose names nobody guesses
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Guard:
    """ASGI middleware that answers what may not pass with 401, 403 or 413."""

    def __init__(self, app: ASGIApp, settings: WebSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its body counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        failure = self.find_fault(scope["method"], scope["path"], Headers(scope=scope))
        if failure is None:
            await self._app(scope, limit_body(receive, self._settings.limits.body_bytes), send)
        else:
            await failure.to_response(scope["path"])(scope, receive, send)

    def find_fault(self, method: str, path: str, headers: Headers) -> Failure | None:
        """Why the request may not pass; None where it may."""
        settings = self._settings
        host = headers.get("host", "")
        if settings.hosts is not None and strip_port(host) not in settings.hosts:
            return Failure(403, "host: the service is not called by that name; give it with --allow-host", param="host")
        if method not in SAFE_METHODS and not is_own_origin(headers.get("origin"), host, settings.origins):
            return Failure(403, "origin: pages of other sites may not call this service; see --cors", param="origin")
        is_open = path in OPEN_PATHS or path.startswith(OPEN_PREFIX) or method == "OPTIONS"
        if settings.api_key is not None and not is_open and not has_key(headers, settings.api_key):
            return Failure(
                401, "authorization: the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                param="authorization", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdecimal() and int(length[:20]) > settings.limits.body_bytes:
            return Failure(413, describe_limit(settings.limits.body_bytes), param="body", code="body_too_large")
        return None


def has_key(headers: Headers, key: str) -> bool:
    """Whether the request has the key, as a bearer's or as a basic password; compared in constant time."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        given = read_password(given)
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), key.encode())


def read_password(credentials: str) -> str:
    """The password of basic authentication; empty where it is none."""
    try:
        decoded = base64.b64decode(credentials, validate=True).decode("utf-8", "replace")
    except (binascii.Error, ValueError):
        return ""
    return decoded.partition(":")[2]


def is_own_origin(origin: str | None, host: str, allowed: Iterable[str]) -> bool:
    """Whether a browser sends this from a page of ours or of a site that is allowed; programs send no origin."""
    return origin is None or origin in allowed or origin.partition("://")[2] == host


def strip_port(host: str) -> str:
    """The name in a Host header, in lower case; IPv6 addresses keep their brackets."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()


def limit_body(receive: Receive, limit: int) -> Receive:
    """``receive`` that raises once more than ``limit`` bytes have come, whatever the header has said."""
    count = 0

    async def receive_counted() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > limit:
            raise HTTPException(413, describe_limit(limit))
        return message

    return receive_counted


def describe_limit(limit: int) -> str:
    """What is said of a body that is too large."""
    return f"body: got more than the {limit / 2**20:g} MiB allowed; send a smaller picture"
