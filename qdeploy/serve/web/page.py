"""The web page at ``/``: one file that fetches nothing from elsewhere, and may run no script but its own."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

INLINE = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


def make_router() -> APIRouter:
    """The page's route."""
    router = APIRouter()

    @router.get("/", response_class=HTMLResponse)
    async def show_page() -> Response:
        headers = {"Content-Security-Policy": make_policy(read_page()), "Cache-Control": "no-cache"}
        return HTMLResponse(read_page(), headers=headers)

    return router


@functools.cache
def read_page() -> str:
    """The file, as it is."""
    return resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")


@functools.cache
def make_policy(page: str) -> str:
    """A content security policy that allows the page's own style and script, by their hashes, and requests to us."""
    hashes = {kind: f"'sha256-{hash_text(text)}'" for kind, text in INLINE.findall(page)}
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src data: blob:; "
        "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
    )


def hash_text(text: str) -> str:
    """As a policy names an inline element."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
