"""Settings of the HTTP side: who may ask, how much, and what is logged."""

from __future__ import annotations

from dataclasses import dataclass

from qdeploy.base.errors import RequestError

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for; each is refused by the field's name.

    body_bytes: of a request, pictures in it included.
    source_pixels: of a picture that comes with a request.
    """

    steps: int = 150
    pictures: int = 10
    pixels: int = 2048 * 2048
    source_pixels: int = 4096 * 4096
    body_bytes: int = 32 * MIB


def check_limit(name: str, value: int, limit: int, unit: str = "") -> None:
    """RequestError for more than the limit, by the name that the client uses."""
    if value > limit:
        raise RequestError(f"{name}: got {value}{unit}, expected at most {limit}{unit}")


@dataclass(frozen=True)
class WebSettings:
    """How requests are answered.

    api_key: what a client must send; None asks for none.
    hosts: names by which the service may be called, which keeps other sites' scripts out of a local one; None for any.
    origins: sites whose pages may call it.
    steps, guidance_scale: of a request that names none.
    timeout_s: of a request, waiting included.
    """

    api_key: str | None = None
    hosts: frozenset[str] | None = None
    origins: frozenset[str] = frozenset()
    limits: Limits = Limits()
    steps: int = 25
    guidance_scale: float = 7.5
    timeout_s: float = 300.0
    log_prompts: bool = False
