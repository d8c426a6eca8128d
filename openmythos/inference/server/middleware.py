"""What stands before the routes: the key, the bound on bodies, the counts of answers, the name."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openmythos.inference.server.errors import ApiError
from openmythos.inference.server.metrics import Metrics

BODY_SECONDS = 60.0
"""How long the body of a request may take to come."""
THROWN_AWAY_SECONDS = 5.0
"""How long a body that is too large is read on, so that its sender sees the answer and no reset."""


@final
class RequireKey:
    """Lets requests to /v1 in with the key alone; compares it in constant time."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        guarded = scope["type"] == "http" and is_within(scope["path"], "/v1")
        if guarded and not self._admits(Headers(scope=scope).get("authorization", "")):
            error = ApiError(
                401,
                "the header `Authorization: Bearer KEY` must hold the server's key",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admits(self, header: str) -> bool:
        kind, _, key = header.partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key)


@final
class LimitBody:
    """Reads each body before the routes do, up to a bound, and answers 413 past it.

    Args:
        app: what stands behind it.
        most: tells the bound, in bytes; it may change when the model is loaded.
    """

    def __init__(self, app: ASGIApp, most: Callable[[], int]) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body in one piece, or refuse it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), BODY_SECONDS)
        except TimeoutError:
            error = ApiError(408, f"the body must come within {BODY_SECONDS:.0f} s")
            await error.response()(scope, receive, send)
            return
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replayed(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body; None where the client has gone."""
        announced, most = Headers(scope=scope).get("content-length", ""), self._most()
        if announced.isdecimal() and int(announced) > most:
            raise await self._too_large(most, receive)
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > most:
                raise await self._too_large(most, receive, more)
        return b"".join(parts)

    async def _too_large(self, most: int, receive: Receive, more: bool = True) -> ApiError:
        try:
            async with asyncio.timeout(THROWN_AWAY_SECONDS):
                while more:
                    message = await receive()
                    more = message["type"] == "http.request" and message.get("more_body", False)
        except TimeoutError:
            pass
        return ApiError(
            413,
            f"the body must have at most {most} bytes, this server's max_body_bytes: send less at "
            "a time",
            code="body_too_large",
            headers={"Connection": "close"},
        )


@final
class CheckHost:
    """Lets requests in that call the server by a name of its own.

    A page elsewhere can have its own name lead to this machine (DNS rebinding), and a browser then
    takes a server that only this machine reaches for a part of that page.

    Args:
        app: what stands behind it.
        names: of the server; ports do not matter.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app, self._names = app, {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else ""
        if host and _without_port(host).lower() not in self._names:
            error = ApiError(
                403,
                f"the header Host={host!r} must name {' or '.join(sorted(self._names))}: call the "
                "server so, or start it with another --host or with an --api-key",
                code="host_not_allowed",
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


@final
class CountRunning:
    """Counts a request while it is answered: from the end of its body to the answer's last byte.

    Args:
        app: what stands behind it.
        counted: holds for as long as one is.
    """

    def __init__(self, app: ASGIApp, counted: Callable[[], AbstractContextManager[None]]) -> None:
        self._app, self._counted = app, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and count it meanwhile."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._counted():
            await self._app(scope, receive, send)


@final
class CountAnswers:
    """Counts responses by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and note the status it gets."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._metrics.answered(_route(scope), message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            if not started:  # its answer is made outside of all that can be added
                self._metrics.answered(_route(scope), 500)
            raise


def _route(scope: Scope) -> str:
    """The route's pattern: paths that clients make up must not become metrics without end."""
    route = scope.get("route")
    return getattr(route, "path", None) or "other"


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give the body once and then what `receive` gives."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def is_within(path: str, root: str) -> bool:
    """Whether a path is `root` or below it."""
    return path == root or path.startswith(f"{root}/")
