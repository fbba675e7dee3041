"""The log and the metrics of each request, and the last answer to a fault: one JSON line, without prompts."""

from __future__ import annotations

import json
import logging
import secrets
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qdeploy.serve.web.failures import failure_from_error
from qdeploy.serve.web.metrics import Metrics

log = logging.getLogger("qdeploy.serve.access")
DETAILS = "qdeploy.details"  # key in a request's scope: what its route adds to the line
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Access:
    """The outermost ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give the request a number, answer what nobody else has answered, and write the line."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        request_id = secrets.token_hex(8)
        scope[DETAILS] = {}

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()), *SECURITY_HEADERS, (b"x-request-id", request_id.encode()),
                ]  # fmt: skip
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except Exception as exc:
            log.exception("%s", json.dumps({"event": "fault", "id": request_id, "error": type(exc).__name__}))
            if status == 0:
                await failure_from_error(exc).to_response(scope["path"])(scope, receive, send_marked)
        finally:
            self._write(scope, request_id, status, time.perf_counter() - start)

    def _write(self, scope: Scope, request_id: str, status: int, spent_s: float) -> None:
        route = name_route(scope)
        self._metrics.count_request(route, status, spent_s)
        client = scope.get("client") or ("",)
        line = {"event": "request", "id": request_id, "method": scope["method"], "route": route, "status": status,
                "ms": round(spent_s * 1e3, 1), "client": client[0], **scope[DETAILS]}  # fmt: skip
        log.info("%s", json.dumps(line))


def name_route(scope: Scope) -> str:
    """The route's pattern, so that neither metrics nor logs grow with what clients write into addresses."""
    return str(getattr(scope.get("route"), "path", "none"))


def add_details(scope: Scope, **details: Any) -> None:
    """Add to the request's line."""
    scope.setdefault(DETAILS, {}).update(details)
