"""Pictures over HTTP: BUNDLE=bundle uvicorn examples.service:app, then GET /picture?prompt=a+cat&seed=1."""

import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Response

import qdeploy
from qdeploy.base.errors import DeadlineError, RequestError


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the bundle at start and free it at the end."""
    with qdeploy.load(os.environ["BUNDLE"], threads=2) as app.state.pipe:  # one for all threads
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/picture")
def picture(prompt: str, seed: int = 0, steps: int = 25, guidance: float = 7.5) -> Response:  # in a worker thread
    """A PNG; 422 for a request that the bundle cannot serve, 503 when it takes longer than a minute."""
    try:
        made = app.state.pipe(prompt, seed=seed, steps=steps, guidance_scale=guidance, deadline_s=60)
    except (RequestError, DeadlineError) as exc:
        raise HTTPException(503 if isinstance(exc, DeadlineError) else 422, str(exc)) from exc
    file = io.BytesIO()
    made.images[0].save(file, format="PNG")
    return Response(file.getvalue(), media_type="image/png")
