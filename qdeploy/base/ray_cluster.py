"""A connection to a Ray cluster: one that runs already, or one of this machine's own, which keeps to itself."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qdeploy.base.errors import EngineUnavailableError

LOCAL = "local"  # a cluster on this machine, stopped when the work is done


@contextmanager
def connect_cluster(address: str = LOCAL, extra: str = "ray", **local: Any) -> Iterator[Any]:
    """The ``ray`` module, connected to ``address``, as ``ray.init`` takes it.

    extra: of qdeploy, that holds what is needed of Ray. local: further options of a cluster that is started here.
    EngineUnavailableError where Ray is not installed or nothing answers.
    """
    with set_environment(make_environment(address)):
        ray = import_ray(extra)
        options: dict[str, Any] = {"include_dashboard": False, **local} if address == LOCAL else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError, RuntimeError) as exc:
            raise EngineUnavailableError(
                f"no Ray cluster answers at {address} ({exc}); start one with `ray start --head`, set "
                "RAY_AUTH_MODE=token where it asks for its token, or give only --ray for one of this machine's own"
            ) from exc
        try:
            yield ray
        finally:
            ray.shutdown()


def import_ray(extra: str = "ray") -> Any:
    """The ``ray`` module; EngineUnavailableError names the extra to install."""
    try:
        import ray
    except ModuleNotFoundError as exc:
        raise EngineUnavailableError(f"--ray needs Ray; run `pip install 'qdeploy[{extra}]'`") from exc
    return ray


def make_environment(address: str) -> dict[str, str]:
    """Variables that Ray reads when it is imported or started.

    A cluster of this machine's own listens at the loopback address only, which Ray does by itself on Windows and macOS,
    and asks for a token that no other user of the machine has: who reaches a cluster can run any code in it.
    """
    environment = {"RAY_USAGE_STATS_ENABLED": "0"}  # otherwise a new cluster sends usage statistics
    ray = sys.modules.get("ray")
    if address != LOCAL or (ray is not None and ray.is_initialized()):
        return environment
    return environment | {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": draw_token(),
    }  # fmt: skip


@functools.cache
def draw_token() -> str:
    """One for this process, because Ray reads it once."""
    return secrets.token_hex(32)


@contextmanager
def set_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that are not set otherwise, while inside."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
