"""The web application of one engine room: all routes, behind one door."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from qdeploy.base.errors import QdeployError
from qdeploy.base.version import read_version
from qdeploy.serve.room import EngineRoom
from qdeploy.serve.web import a1111, a1111_bodies, openai_bodies, openai_images, page, status
from qdeploy.serve.web.access import Access
from qdeploy.serve.web.desk import Desk
from qdeploy.serve.web.failures import failure_from_error, failure_from_validation
from qdeploy.serve.web.guard import Guard
from qdeploy.serve.web.metrics import Metrics
from qdeploy.serve.web.pictures import PictureDesk
from qdeploy.serve.web.settings import WebSettings


def create_app(room: EngineRoom, metrics: Metrics, settings: WebSettings | None = None) -> FastAPI:
    """The application. ``metrics`` is the room's observer; starting and stopping the room is the caller's."""
    settings = WebSettings() if settings is None else settings
    desk = Desk(room, settings, PictureDesk(settings.limits.source_pixels))
    # pages of docs_url and redoc_url would fetch scripts from elsewhere
    app = FastAPI(title="qdeploy serve", version=read_version(), docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(openai_images.make_router(desk))
    app.include_router(page.make_router())
    app.include_router(a1111.make_router(desk))
    app.include_router(status.make_router(desk, metrics))
    app.add_exception_handler(RequestValidationError, answer_validation)
    app.add_exception_handler(HTTPException, answer_error)
    app.add_exception_handler(QdeployError, answer_error)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=sorted(settings.origins), allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )  # fmt: skip
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(Access, metrics=metrics)  # what is added last comes first
    metrics.watch(room, lambda: desk.store.total_bytes)
    return app


async def answer_error(request: Request, exc: Exception) -> Response:
    """An error of ours or of Starlette's, with the names of the interface that was asked."""
    path = request.url.path
    names = a1111_bodies.NAMES if path.startswith("/sdapi/") else openai_bodies.NAMES
    return failure_from_error(exc, names).to_response(path)


async def answer_validation(request: Request, exc: Exception) -> Response:
    """A body that is not what its route takes."""
    assert isinstance(exc, RequestValidationError)
    return failure_from_validation(exc.errors()).to_response(request.url.path)
