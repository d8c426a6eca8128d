"""How answers go out, whole or as events: who stalls, goes or falls behind is given up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, final

from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from openmythos.inference.server.errors import ApiError, json_text
from openmythos.inference.server.mailbox import Mailbox, TooSlowError

log = logging.getLogger("openmythos.server")

PART = 1 << 16
"""Bytes of an answer that are sent at once: the next ones wait until the client has taken most."""

STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""Says in a route's description that its answer may be a stream."""


@final
class WholeAnswer(Response):
    """JSON in parts, each of which the client must take in time.

    Args:
        text: the JSON.
        send_seconds: how long the client may take nothing.
    """

    def __init__(self, text: str, send_seconds: float) -> None:
        super().__init__(text, media_type="application/json")
        self._seconds = send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, or leave it unfinished, which closes the connection."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            for begin in range(0, len(self.body), PART):
                part = bytes(self.body[begin : begin + PART])
                await self._send(send, part, more=True)
            await self._send(send, b"", more=False)  # waits for the last part to be taken as well
        except TimeoutError:
            _tell_stalled(self._seconds)

    async def _send(self, send: Send, part: bytes, *, more: bool) -> None:
        async with asyncio.timeout(self._seconds):
            await send({"type": "http.response.body", "body": part, "more_body": more})


@final
class EventStream(EventSourceResponse):
    """Sends each chunk as one event, then `[DONE]`; an error on the way is an event as well.

    Args:
        chunks: bodies of the events, as JSON.
        mailbox: where they come from; closed when the response ends, however it ends.
        send_seconds: how long the client may take nothing.
    """

    def __init__(self, chunks: AsyncIterator[str], mailbox: Mailbox, send_seconds: float) -> None:
        super().__init__(_events(chunks), sep="\n", send_timeout=send_seconds)
        self._mailbox, self._seconds = mailbox, send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            _tell_stalled(self._seconds)
        finally:
            self._mailbox.close()  # here, because chunks that never began have no end


def _tell_stalled(seconds: float) -> None:
    log.warning("a client took nothing for %g s and was disconnected", seconds)


async def _events(chunks: AsyncIterator[str]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except TooSlowError:
        yield _event(json_text(_too_slow().body()))
    except ApiError as error:
        yield _event(json_text(error.body()))
    yield _event("[DONE]")


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


def _too_slow() -> ApiError:
    return ApiError(
        400, "the client reads too slowly: more waited for it than may", code="client_too_slow"
    )
