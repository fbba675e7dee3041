"""Answers of OpenAI's images API: one JSON document, or server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.sse import format_sse_event

from qdeploy.serve.order import Order
from qdeploy.serve.ticket import Made, Pixels, Progress
from qdeploy.serve.web.desk import Desk
from qdeploy.serve.web.failures import failure_from_error
from qdeploy.serve.web.following import Follower
from qdeploy.serve.web.openai_bodies import NAMES, GenerationBody
from qdeploy.serve.web.pictures import base64_from_bytes

PING_S = 10.0  # between signs of life to a client that waits for events
NO_TOKENS = {"image_tokens": 0, "text_tokens": 0}
USAGE = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": NO_TOKENS}


@dataclass(frozen=True)
class Answer:
    """How one request's pictures are answered.

    size: of the pictures, as OpenAI writes it. base_url: of the service, as the client calls it.
    event: `image_generation` or `image_edit`.
    """

    desk: Desk
    order: Order
    body: GenerationBody
    size: str
    base_url: str
    event: str

    @property
    def common(self) -> dict[str, Any]:
        """What a document and every event say."""
        return {"output_format": self.body.kind, "size": self.size, "background": "opaque", "quality": "auto"}

    async def make_document(self, made: Made) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        data = [
            await self._describe_picture(pixels, seed)
            for pixels, seed in zip(made.pixels, self.order.seeds, strict=True)
        ]
        return {
            "created": int(time.time()), "data": data, **self.common, **self._tell_more(made), "usage": USAGE,
        }  # fmt: skip

    async def stream(self, follower: Follower) -> AsyncIterator[bytes]:
        """Server-sent events: previews, and a completed picture each. Comments, which clients skip, tell of steps."""
        shown = 0
        try:
            yield b": taken\n\n"  # the answer begins with it, so that what follows is sure to run to its end
            async for event in follower.events():
                if event is None:
                    yield b": waiting\n\n"
                elif isinstance(event, Progress):
                    yield f": step {event.index + 1} of {event.count}\n\n".encode()
                    if event.pixels is not None:
                        yield await self._make_preview(event.pixels, shown)
                        shown += 1
                else:
                    for pixels, seed in zip(event.pixels, self.order.seeds, strict=True):
                        yield await self._make_completed(pixels, seed, event)
        except Exception as exc:  # the status is sent already
            failure = failure_from_error(exc, NAMES)
            yield make_event("error", {"type": "error", **failure.to_openai(), "status": failure.status})
        finally:
            follower.close()

    async def _make_preview(self, pixels: Pixels, number: int) -> bytes:
        encoded = base64_from_bytes(await self._encode(pixels[0]))
        more = {"b64_json": encoded, "partial_image_index": number, "created_at": int(time.time())}
        return self._make_event("partial_image", {**more, **self.common})

    async def _make_completed(self, pixels: Pixels, seed: int, made: Made) -> bytes:
        picture = await self._describe_picture(pixels, seed)
        more = {**self.common, **self._tell_more(made), "created_at": int(time.time()), "usage": USAGE}
        return self._make_event("completed", {**more, **picture})

    def _make_event(self, name: str, data: Mapping[str, Any]) -> bytes:
        kind = f"{self.event}.{name}"
        return make_event(kind, {"type": kind, **data})

    async def _describe_picture(self, pixels: Pixels, seed: int) -> dict[str, Any]:
        encoded = await self._encode(pixels)
        if self.body.response_format == "url":
            name = self.desk.store.add(encoded, self.body.kind)
            return {"url": f"{self.base_url}pictures/{name}", "seed": seed}
        return {"b64_json": base64_from_bytes(encoded), "seed": seed}

    async def _encode(self, pixels: Pixels) -> bytes:
        return await self.desk.pictures.encode(pixels, self.body.kind, self.body.compression)

    def _tell_more(self, made: Made) -> dict[str, Any]:
        """What OpenAI does not tell: which model and seed, how long, and what of a prompt was not read."""
        unread: Sequence[str] = [f"too long, not read: {end}" for end in made.truncated.values()]
        times = {"waited_s": round(made.waited_s, 4), "spent_s": round(made.spent_s, 4)}
        return {"model": self.order.bundle, "seed": self.order.seeds[0], "timings": times, "warnings": unread}


def make_event(name: str, data: Mapping[str, Any]) -> bytes:
    """One server-sent event with JSON in it."""
    return format_sse_event(event=name, data_str=json.dumps(data))
