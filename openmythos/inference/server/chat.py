"""`POST /v1/chat/completions`: a conversation, and the model's reply to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, final

from anyio import to_thread
from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from starlette.responses import Response

from openmythos.inference.request import Event
from openmythos.inference.server.answers import (
    Answer,
    Usage,
    finish_of,
    text_of,
    tokens_of,
    unless_gone,
)
from openmythos.inference.server.errors import text_response
from openmythos.inference.server.logprobs import chat_logprob
from openmythos.inference.server.schemas import (
    ChatBody,
    ChatCompletion,
    StreamOptions,
    refuse_model,
)
from openmythos.inference.server.serving import Serving, serving
from openmythos.inference.server.stream import STREAMED, EventStream
from openmythos.inference.server.translate import of_chat
from openmythos.training.tokenizer import Tokenizer

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def reply(
    body: ChatBody, request: HttpRequest, server: Annotated[Serving, Depends(serving)]
) -> Response:
    """Reply to a conversation."""
    loaded = server.ready()
    refuse_model(body.model, server.name)
    body.check()
    asked = await to_thread.run_sync(of_chat, body, loaded, server.settings)
    settings, streams = server.settings, bool(body.stream)
    answer = Answer(
        kind="chatcmpl",
        object="chat.completion.chunk" if streams else "chat.completion",
        model=server.name,
        writers=[ChatWriter(body, loaded.lm.tokenizer) for _ in range(body.choices)],
        choices=body.choices,
        mailbox=server.submit(
            [asked], most=settings.max_unread * body.choices if streams else None
        ),
        usage=Usage([len(asked.token_ids)]),
    )
    if streams:
        chunks = answer.chunks(body.stream_options or StreamOptions())
        return EventStream(chunks, answer.mailbox, settings.send_seconds)
    try:
        return text_response(await unless_gone(request, answer.whole()))
    finally:
        answer.mailbox.close()


@final
class ChatWriter:
    """One reply."""

    def __init__(self, body: ChatBody, tokenizer: Tokenizer) -> None:
        self._body, self._tokenizer = body, tokenizer

    def opening(self) -> dict[str, Any]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, events: Sequence[Event]) -> dict[str, Any] | None:
        """What is new."""
        text, rest = text_of(events), self._rest(events)
        tokens = (rest["logprobs"] or {}).get("content") or rest.get("loops")
        if not (text or tokens or rest["finish_reason"]):
            return None
        return {"delta": {"content": text} if text or tokens else {}, **rest}

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """All of it."""
        return {
            "message": {"role": "assistant", "content": text_of(events), "refusal": None},
            **self._rest(events),
        }

    def _rest(self, events: Sequence[Event]) -> dict[str, Any]:
        tokens = tokens_of(events)
        rest: dict[str, Any] = {"logprobs": None, "finish_reason": finish_of(events)}
        if self._body.logprobs:
            content = [
                chat_logprob(self._tokenizer, token.token_id, token.logprob, token.top_logprobs)
                for token in tokens
                if token.logprob is not None
            ]
            rest["logprobs"] = {"content": content, "refusal": None}
        if self._body.return_loops:
            rest["loops"] = [token.loops for token in tokens]
        return rest
