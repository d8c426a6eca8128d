"""`POST /v1/completions`: text or token ids, continued."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, final

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from starlette.responses import Response

from openmythos.inference.request import Event, PromptEvent, Request
from openmythos.inference.server.answers import finish_of, respond, text_of, tokens_of
from openmythos.inference.server.logprobs import LogprobLists, Offsets
from openmythos.inference.server.schemas import Completion, CompletionBody
from openmythos.inference.server.serving import Loaded, Serving, serving
from openmythos.inference.server.settings import ServerSettings
from openmythos.inference.server.stream import STREAMED
from openmythos.inference.server.translate import of_completion
from openmythos.training.tokenizer import Tokenizer

router = APIRouter()


@router.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def complete(
    body: CompletionBody, request: HttpRequest, server: Annotated[Serving, Depends(serving)]
) -> Response:
    """Continue text or token ids."""
    read = partial(_read, body, server.settings)
    return await respond(body, request, server, read, prefix="cmpl", named="text_completion")


def _read(
    body: CompletionBody, settings: ServerSettings, loaded: Loaded
) -> tuple[list[Request], list[CompletionWriter]]:
    """Return a request for each prompt, and a writer for each choice."""
    requests, starts = of_completion(body, loaded, settings)
    tokenizer = loaded.lm.tokenizer
    writers: list[CompletionWriter] = []
    for asked in requests:
        prompt = Echo(body, asked.token_ids[1 if starts else 0 :], tokenizer)
        writers += [CompletionWriter(body, prompt, tokenizer) for _ in range(body.choices)]
    return requests, writers


@final
class Echo:
    """A prompt as answers give it back: what takes long is done once, for all of its choices.

    Args:
        body: what was asked.
        token_ids: the prompt's as the caller knows them.
        tokenizer: the model's.
    """

    def __init__(
        self, body: CompletionBody, token_ids: Sequence[int], tokenizer: Tokenizer
    ) -> None:
        self._token_ids, self._tokenizer = token_ids, tokenizer
        # The bytes of a character that is not whole yet come with the next token, or at the end.
        self.text = "".join(map(tokenizer.text_stream().push, token_ids)) if body.echo else ""
        """The prompt, where it is wanted back."""
        self._end = Offsets(tokenizer)
        if body.logprobs is not None:
            for token_id in token_ids:
                self._end.next(token_id)
        self._lists: dict[str, list[Any]] | None = None

    def offsets(self) -> Offsets:
        """Return those of the text that follows."""
        return self._end.copy(len(self.text))

    def logprobs(self, event: PromptEvent) -> dict[str, list[Any]]:
        """Return the entries of the prompt's tokens, without the mark that the server put first."""
        if self._lists is None:
            entries = LogprobLists(self._tokenizer)
            marks = len(event.logprobs) - len(self._token_ids)
            for place, token_id in enumerate(self._token_ids, start=marks):
                entries.add(token_id, event.logprobs[place], event.top_logprobs[place])
            self._lists = entries.take()
        return self._lists


@final
class CompletionWriter:
    """One choice of a completion.

    Args:
        body: what was asked.
        prompt: what it continues.
        tokenizer: the model's.
    """

    def __init__(self, body: CompletionBody, prompt: Echo, tokenizer: Tokenizer) -> None:
        self._body, self._prompt, self._echoed = body, prompt, prompt.text
        self._logprobs: LogprobLists | None = None
        if body.logprobs is not None:
            self._logprobs = LogprobLists(tokenizer, prompt.offsets())

    def opening(self) -> dict[str, Any] | None:
        """The prompt, where it is wanted back without what must be computed first."""
        if not self._body.echo or self._logprobs is not None:
            return None
        return self._choice([], self._take_echo())

    def chunk(self, events: Sequence[Event]) -> dict[str, Any] | None:
        """What is new."""
        prompt_read = any(isinstance(event, PromptEvent) for event in events)
        choice = self._choice(events, self._take_echo() if prompt_read else "")
        shows = choice["text"] or choice["finish_reason"] or choice.get("loops")
        return choice if shows or (choice["logprobs"] or {}).get("tokens") else None

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """All of it."""
        return self._choice(events, self._take_echo())

    def _take_echo(self) -> str:
        echoed, self._echoed = self._echoed, ""
        return echoed

    def _choice(self, events: Sequence[Event], echoed: str) -> dict[str, Any]:
        tokens = tokens_of(events)
        choice: dict[str, Any] = {
            "text": echoed + text_of(events),
            "logprobs": None,
            "finish_reason": finish_of(events),
        }
        if self._logprobs is not None:
            for token in tokens:
                self._logprobs.add(token.token_id, token.logprob, token.top_logprobs)
            choice["logprobs"] = self._logprobs.take()
            for event in events:
                if isinstance(event, PromptEvent):
                    first = self._prompt.logprobs(event)
                    choice["logprobs"] = {
                        name: first[name] + values for name, values in choice["logprobs"].items()
                    }
        if self._body.return_loops:
            choice["loops"] = [token.loops for token in tokens]
        return choice
