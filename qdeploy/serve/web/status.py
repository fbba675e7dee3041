"""Health, readiness and metrics, for what watches a service."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from qdeploy.serve.web.desk import Desk
from qdeploy.serve.web.metrics import Metrics


def make_router(desk: Desk, metrics: Metrics) -> APIRouter:
    """The routes of one service."""
    router = APIRouter()

    @router.get("/healthz")
    async def tell_health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/readyz")
    async def tell_readiness() -> Response:
        if desk.room.is_ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "the service is starting or being stopped"}, 503)

    @router.get("/metrics")
    def tell_metrics() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router
