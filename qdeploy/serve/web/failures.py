"""Errors as HTTP answers: which status, which words, and which field is at fault. No path and no secret goes out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from qdeploy.base.errors import (
    CancelledError,
    DeadlineError,
    NonFiniteError,
    PictureError,
    QueueFullError,
    RequestError,
    ServiceError,
    StoppingError,
    UnknownBundleError,
    UsageError,
)
from qdeploy.base.schemas import format_value

CLIENT_CLOSED = 499  # nginx's status for a client that is gone; it is only seen in logs
INVALID = "invalid_request_error"
NAMES = (
    "prompt", "negative_prompt", "seed", "steps", "guidance_scale", "guidance_rescale", "scheduler", "width", "height",
    "strength", "image", "mask", "model", "n", "size", "num_inference_steps", "cfg_scale", "init_images", "body",
    "sampler_name", "sampler_index", "denoising_strength", "batch_size", "n_iter", "partial_images", "background",
    "output_format", "output_compression", "speed", "forecast", "guidance_interval",
)  # fmt: skip
NAME = re.compile(rf"\b({'|'.join(sorted(NAMES, key=len, reverse=True))})\b")


@dataclass(frozen=True)
class Failure:
    """One answer that is no picture. ``param``: the field at fault, as the client called it."""

    status: int
    message: str
    kind: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_openai(self) -> dict[str, Any]:
        """OpenAI's form of it."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def to_a1111(self) -> dict[str, Any]:
        """The form of AUTOMATIC1111's web UI."""
        return {"error": self.code or self.kind, "detail": self.message, "body": "", "errors": self.message}

    def to_response(self, path: str) -> JSONResponse:
        """The answer in the form of the interface that ``path`` belongs to."""
        body = self.to_a1111() if path.startswith("/sdapi/") else self.to_openai()
        return JSONResponse(body, self.status, dict(self.headers))


def failure_from_error(exc: Exception, names: Mapping[str, str] | None = None) -> Failure:
    """How an error of ours is answered; ``names``: the runtime's name of an argument -> the interface's.

    Faults that are not the client's get a status of 500 and no details: those are in the log.
    """
    match exc:
        case UnknownBundleError():
            return Failure(404, str(exc), param="model", code="model_not_found")
        case QueueFullError():
            wait = str(max(1, math.ceil(exc.retry_after_s)))
            return Failure(429, str(exc), "rate_limit_error", None, "queue_full", {"Retry-After": wait})
        case StoppingError():
            return Failure(503, str(exc), "server_error", None, "stopping", {"Retry-After": "5"})
        case ServiceError():
            return Failure(503, str(exc), "server_error", None, "unavailable", {"Retry-After": "5"})
        case DeadlineError():
            return Failure(503, str(exc), "server_error", None, "deadline")
        case CancelledError():
            return Failure(CLIENT_CLOSED, "the request was cancelled", INVALID, None, "cancelled")
        case NonFiniteError():
            return Failure(422, str(exc), INVALID, "guidance_scale", "not_finite")
        case RequestError() | UsageError() | PictureError():
            message = rename_arguments(str(exc), names or {})
            return Failure(400, message, INVALID, find_param(message), "invalid_value")
        case HTTPException():
            message = describe_http(exc)
            return Failure(exc.status_code, message, param=find_param(message), headers=dict(exc.headers or {}))
    return Failure(500, "the service has failed; its log says why", "server_error", None, "internal_error")


def failure_from_validation(errors: Sequence[Mapping[str, Any]]) -> Failure:
    """The first fault that pydantic has found in a body."""
    first = errors[0]
    parts = [str(part) for part in first["loc"] if part != "body" and not isinstance(part, int)]
    param = ".".join(parts) or "body"
    match first["type"]:
        case "json_invalid":
            reason = f"it is no valid JSON ({first.get('ctx', {}).get('error', 'cut or broken')})"
        case "extra_forbidden":
            reason = "there is no such field; is it spelled right?"
        case "missing":
            reason = "it is missing"
        case _ if param == "body":
            reason = "expected a JSON object, sent as application/json"
        case _:
            reason = f"{first['msg']}; got {format_value(first.get('input'))}"
    return Failure(400, f"{param[:100]}: {reason}", INVALID, param[:100], "invalid_value")


def rename_arguments(message: str, names: Mapping[str, str]) -> str:
    """``message`` with the interface's names in the place of the runtime's."""
    known = "|".join(sorted(names, key=len, reverse=True))
    return re.sub(rf"^({known})(?=:)", lambda match: names[match[1]], message) if names else message


def find_param(message: str) -> str | None:
    """The field that a message of ours is about, which it names in its first words."""
    match = NAME.search(message[:100])
    return None if match is None else match[1]


def describe_http(exc: HTTPException) -> str:
    """What Starlette says, with what it is about."""
    if exc.status_code in (404, 405):
        return {404: "there is no such address here", 405: "this address takes another method"}[exc.status_code]
    detail = str(exc.detail)
    return detail if detail.startswith("body: ") else f"body: {detail}"
