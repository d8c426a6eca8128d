"""`POST /v1/chat/completions`: a conversation, and the model's reply to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, final

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from starlette.responses import Response

from openmythos.inference.request import Event, Request
from openmythos.inference.server.answers import finish_of, respond, text_of, tokens_of
from openmythos.inference.server.logprobs import chat_logprob
from openmythos.inference.server.schemas import ChatBody, ChatCompletion
from openmythos.inference.server.serving import Loaded, Serving, serving
from openmythos.inference.server.settings import ServerSettings
from openmythos.inference.server.stream import STREAMED
from openmythos.inference.server.translate import of_chat
from openmythos.training.tokenizer import Tokenizer

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def reply(
    body: ChatBody, request: HttpRequest, server: Annotated[Serving, Depends(serving)]
) -> Response:
    """Reply to a conversation."""
    named = "chat.completion.chunk" if body.stream else "chat.completion"
    read = partial(_read, body, server.settings)
    return await respond(body, request, server, read, prefix="chatcmpl", named=named)


def _read(
    body: ChatBody, settings: ServerSettings, loaded: Loaded
) -> tuple[list[Request], list[ChatWriter]]:
    """Return the request, and a writer for each choice."""
    asked = of_chat(body, loaded, settings)  # first: it checks how many choices there are
    return [asked], [ChatWriter(body, loaded.lm.tokenizer) for _ in range(body.choices)]


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
