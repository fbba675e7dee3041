"""A bundle as a model of Triton's Python backend: what a repository's ``model.py`` imports, inside Triton's process.

Requests that Triton's dynamic batcher brings together share UNet calls as in the service; each gets its own pictures or
its own error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.artifacts.manifest import LatentInfo, Manifest
from qdeploy.base.errors import CancelledError, QdeployError, RequestError
from qdeploy.runtime.pipeline import load
from qdeploy.serve.checks import check_order
from qdeploy.serve.joining import count_shared
from qdeploy.serve.order import Order, PictureSettings, draw_seeds
from qdeploy.serve.rendering import render_tickets
from qdeploy.serve.ticket import Ticket

BUNDLE_FOLDER = "bundle"  # next to model.py
NO_DETAILS = "the model has failed; Triton's log says why"


@dataclass
class Asked:
    """One request of Triton's. ``tickets``: one a row, or ``error``: why it has none."""

    request: Any
    tickets: list[Ticket] = field(default_factory=list)
    error: Exception | None = None


class TritonPythonModel:
    """The class that Triton's Python backend looks for in ``model.py``."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle next to ``model.py``, on the engine that config.pbtxt names."""
        import triton_python_backend_utils

        self._utils = triton_python_backend_utils
        config = json.loads(args["model_config"])
        values = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        folder = Path(args["model_repository"], args["model_version"], BUNDLE_FOLDER)
        threads = int(values["threads"]) if values.get("threads") else None
        self._steps, self._guidance_scale = int(values["steps"]), float(values["guidance_scale"])
        self._pictures_at_once = int(values["pictures_at_once"])
        self._pipe = load(folder, engine=values.get("engine") or None, threads=threads)
        self._manifest = self._pipe.bundle.manifest

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request, in their order."""
        asked = [self._read(request) for request in requests]
        for group in join_tickets(
            [ticket for one in asked for ticket in one.tickets], self._manifest, self._pictures_at_once
        ):
            self._render(group, asked)
        return [self._respond(one) for one in asked]

    def finalize(self) -> None:
        """Free the bundle."""
        self._pipe.close()

    def _read(self, request: Any) -> Asked:
        try:
            orders = [self._make_order(row) for row in self._read_rows(request)]
        except (QdeployError, ValueError) as exc:
            return Asked(request, error=exc)
        return Asked(request, [Ticket(order) for order in orders])

    def _read_rows(self, request: Any) -> list[dict[str, Any]]:
        """The values of each row's inputs, by name."""
        names = ("PROMPT", "NEGATIVE_PROMPT", "SEED", "STEPS", "GUIDANCE_SCALE", "WIDTH", "HEIGHT")
        tensors = {name: self._utils.get_input_tensor_by_name(request, name) for name in names}
        columns = {
            name: tensor.as_numpy().reshape(-1).tolist() for name, tensor in tensors.items() if tensor is not None
        }
        lengths = {len(column) for column in columns.values()}
        if len(lengths) != 1:
            raise RequestError(f"inputs: got columns of {sorted(lengths)} rows, expected one length for all")
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _make_order(self, row: Mapping[str, Any]) -> Order:
        order = Order(
            bundle="",
            prompt=None if "PROMPT" not in row else read_text("PROMPT", row["PROMPT"]),
            negative_prompt=read_text("NEGATIVE_PROMPT", row.get("NEGATIVE_PROMPT", b"")),
            seeds=draw_seeds(None if "SEED" not in row else int(row["SEED"]), 1),
            settings=PictureSettings(
                steps=int(row.get("STEPS", self._steps)),
                guidance_scale=float(row.get("GUIDANCE_SCALE", self._guidance_scale)),
                width=row.get("WIDTH"),
                height=row.get("HEIGHT"),
            ),
        )
        check_order(self._manifest, order)
        return order

    def _render(self, group: Sequence[Ticket], asked: Sequence[Asked]) -> None:
        size: LatentInfo = check_order(self._manifest, group[0].order)

        def check_wanted(_: float) -> None:
            for one in asked:
                if one.request.is_cancelled():
                    for ticket in one.tickets:
                        ticket.fail(CancelledError("the request was cancelled"))

        check_wanted(0)
        render_tickets(self._pipe, group, (size.image_width, size.image_height), self._pictures_at_once, check_wanted)

    def _respond(self, asked: Asked) -> Any:
        error = asked.error or next((ticket.error for ticket in asked.tickets if ticket.error is not None), None)
        if error is None:
            pixels = [ticket.result(0).pixels for ticket in asked.tickets]
            if len({picture.shape for picture in pixels}) > 1:
                error = RequestError("WIDTH, HEIGHT: got several sizes in one request, expected one")
            else:
                seeds = np.array([ticket.order.seeds for ticket in asked.tickets], np.int64)
                tensors = [self._utils.Tensor("IMAGES", np.concatenate(pixels)), self._utils.Tensor("SEEDS", seeds)]
                return self._utils.InferenceResponse(output_tensors=tensors)
        told = str(error) if isinstance(error, QdeployError | ValueError) else NO_DETAILS
        return self._utils.InferenceResponse(output_tensors=[], error=self._utils.TritonError(told))


def read_text(name: str, value: Any) -> str:
    """A row's text; RequestError where it is no UTF-8."""
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as exc:
        raise RequestError(f"{name}: got bytes that are no UTF-8 ({exc.reason}); send text") from exc


def join_tickets(tickets: Sequence[Ticket], manifest: Manifest, pictures_at_once: int) -> Iterator[list[Ticket]]:
    """Those of equal settings, in groups that share UNet calls."""
    waiting = list(tickets)
    while waiting:
        settings = waiting[0].order.settings
        equal = [ticket for ticket in waiting if ticket.order.settings == settings]
        group = equal[: count_shared(manifest, settings, pictures_at_once)]
        waiting = [ticket for ticket in waiting if ticket not in group]
        yield group
