"""The web application: routes, what stands before them, and places for more.

A page is added by its routes and a folder of files: `create_app(server, routers=[...],
static=folder)`. Routes get what is served by `Depends(serving)`; the folder is found at `/`, where
its `index.html` answers, and after every route, so that no file can hide one.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, final

from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Scope

from openmythos import __version__
from openmythos.inference.server import chat, completions
from openmythos.inference.server.errors import add_handlers, json_response
from openmythos.inference.server.metrics import CONTENT_TYPE
from openmythos.inference.server.middleware import (
    CountAnswers,
    CountRunning,
    LimitBody,
    RequireKey,
    is_within,
)
from openmythos.inference.server.schemas import (
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    refuse_model,
)
from openmythos.inference.server.serving import Serving, serving
from openmythos.model.halting import halting_kinds

FAILURES = (400, 401, 403, 404, 405, 408, 413, 422, 429, 500, 503)
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": "An error, in OpenAI's shape"}
    for status in FAILURES
}
TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}

router = APIRouter()
Server = Annotated[Serving, Depends(serving)]


def create_app(
    server: Serving, *, routers: Sequence[APIRouter] = (), static: Path | None = None
) -> FastAPI:
    """Build the application around a model that may still have to be loaded.

    Args:
        server: what is served; loading begins when the application starts.
        routers: further routes.
        static: folder whose files are found at `/`.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        server.start()
        yield
        await to_thread.run_sync(server.stop)

    app = FastAPI(
        title="OpenMythos",
        version=__version__,
        lifespan=life,
        docs_url=None,  # those pages would load scripts from elsewhere
        redoc_url=None,
        responses=DOCUMENTED,
    )
    app.state.serving = server
    add_handlers(app)
    for part in (router, completions.router, chat.router, *routers):
        app.include_router(part)
    if static is not None:
        app.router.routes.append(Rest("/", Fresh(directory=static, html=True), list(app.routes)))
    # Inside of what waits for bodies: those that still come do not count.
    app.add_middleware(CountRunning, counted=server.answering)
    app.add_middleware(LimitBody, most=lambda: server.most_body)
    if server.settings.api_key is not None:
        app.add_middleware(RequireKey, key=server.settings.api_key)
        _describe_key(app)
    if server.settings.allowed_origins:  # outside of the key, which no browser sends in advance
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    app.add_middleware(CountAnswers, metrics=server.metrics)  # the last added stands first
    return app


@final
class Rest(Mount):
    """What no other route is about, to be read.

    A path that a route has, with another method, is answered 405; any other, sent something, 404.
    """

    def __init__(self, path: str, app: ASGIApp, others: Sequence[BaseRoute]) -> None:
        super().__init__(path, app)
        self._others = others

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match where no other route knows the path."""
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return Match.NONE, {}
        if any(route.matches(scope)[0] is not Match.NONE for route in self._others):
            return Match.NONE, {}
        return super().matches(scope)


@final
class Fresh(StaticFiles):
    """Files that a browser keeps and asks about each time: parts of two versions do not mix."""

    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        """Return a file, or 304 where the browser has it."""
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers["Cache-Control"] = "no-cache"
        return response


@router.head("/health", include_in_schema=False)  # as load balancers ask
@router.get(
    "/health",
    response_model=Health,
    responses={503: {"model": Health, "description": "Requests are not taken"}},
)
async def health(server: Server) -> Response:
    """Tell whether requests are taken: 200, or 503 while loading, draining or after a failure."""
    state = server.state
    return json_response({"status": state}, 200 if state == "ready" else 503)


@router.get("/metrics", response_class=Response, responses=TEXT)
async def metrics(server: Server) -> Response:
    """Show what is counted, for Prometheus."""
    return Response(server.metrics.page(), media_type=CONTENT_TYPE)


@router.get("/v1/models", response_model=ModelList)
async def models(server: Server) -> Response:
    """List the one model there is."""
    return json_response({"object": "list", "data": [_card(server)]})


@router.get("/v1/models/{model:path}", response_model=ModelCard)
async def model(model: str, server: Server) -> Response:
    """Describe the model."""
    refuse_model(model, server.name)
    return json_response(_card(server))


def _describe_key(app: FastAPI) -> None:
    """Say in the interface's description what `RequireKey` wants: FastAPI does not know of it."""
    described = app.openapi()
    described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in described["paths"].items():
        if is_within(path, "/v1"):
            for operation in operations.values():
                operation["security"] = [{"key": []}]


def _card(server: Serving) -> dict[str, Any]:
    loaded = server.ready()
    card = ModelCard(
        id=server.name,
        object="model",
        created=loaded.created,
        owned_by="openmythos",
        max_model_len=loaded.max_length,
        mean_loops=loaded.lm.model.config.mean_loops,
        max_loops=server.settings.max_loops,
        halting=halting_kinds(loaded.lm.model.config),
    )
    return card.model_dump()
