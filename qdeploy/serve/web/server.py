"""The HTTP server: uvicorn, which lets the engine room finish or refuse what it has when it is told to stop."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from qdeploy.runtime.tokenizer import log_cut_prompts
from qdeploy.serve.room import EngineRoom

MARGIN_S = 5.0  # for answers to go out after the room has ended its tickets


class Server(uvicorn.Server):
    """uvicorn's server over one room.

    finish_s: how long pictures that are asked for already may take after the signal to stop.
    """

    def __init__(self, app: FastAPI, room: EngineRoom, finish_s: float) -> None:
        config = uvicorn.Config(
            app, lifespan="off", log_config=None, access_log=False, server_header=False,
            http="h11", loop="asyncio", ws="none",  # the same whatever else is installed
            timeout_graceful_shutdown=int(finish_s + MARGIN_S),
        )  # fmt: skip
        super().__init__(config)
        self._room, self._finish_s = room, finish_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals to stop while the server runs; it has stopped on purpose then, so none is raised again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the room while connections are kept for its answers; a second signal does not wait."""
        stopping = threading.Thread(target=self._room.stop, args=(self._finish_s,), daemon=True)
        stopping.start()
        await super().shutdown(sockets)
        if not self.force_exit:
            stopping.join(MARGIN_S)


class JsonLines(logging.Formatter):
    """A log line as one JSON object; what is one already is kept as it is, with time and level."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        text = record.getMessage()
        fields = json.loads(text) if text.startswith('{"event"') else {"event": "log", "message": text}
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "logger": record.name, **fields}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(with_prompts: bool) -> None:
    """Send what the service logs to standard error, one JSON object a line.

    Without prompts, the runtime's lines on prompts that were cut, which quote them, are left out; the answers tell it.
    """
    log_cut_prompts(with_prompts)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("qdeploy", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def open_socket(host: str, port: int) -> socket.socket:
    """A listening address; OSError where it is taken or none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host, port))
    return listening
