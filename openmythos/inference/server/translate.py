"""From the fields of a body to requests for the engine. Knows no HTTP but its errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openmythos.errors import InputError, MythosError, TokenizerError
from openmythos.inference.chat import Message
from openmythos.inference.request import Constraint, Request
from openmythos.inference.sampling import Sampling
from openmythos.inference.server.errors import invalid
from openmythos.inference.server.json_output import JsonGrammars
from openmythos.inference.server.room import Asked, check_logprobs, tokens_to_make, too_long
from openmythos.inference.server.schemas import ChatBody, ChatMessage, CompletionBody, Generation
from openmythos.inference.server.serving import Loaded
from openmythos.inference.server.settings import ServerSettings
from openmythos.inference.thinking import Thinking

LARGEST_SEED = (1 << 63) - 1
"""The engine's. A negative seed is taken without its sign bit, as 2^63 more."""


def of_completion(
    body: CompletionBody, loaded: Loaded, settings: ServerSettings
) -> tuple[list[Request], bool]:
    """Return a request for each prompt, and whether the prompts start a document (are text).

    A start is marked by the end-of-document token, which the caller never sees.

    Raises:
        ApiError, InputError: a field does not fit.
    """
    count = _count(body.prompt)
    _check_choices(count, body, settings)
    prompts, starts = _prompts(body, loaded)
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens=0 must go with echo=true: else there is no text", "max_tokens")
    requests = [
        _request(
            body,
            loaded,
            Asked(
                token_ids=tuple(token_ids),
                most=body.max_tokens,
                usual=16,
                fields=("prompt", "max_tokens"),
                choices=body.choices,
                answered=body.choices * count,
                thinking=_thinking(body, loaded, settings),
                logprobs=body.logprobs,
                echoed=bool(body.echo) and body.logprobs is not None,
                streamed=bool(body.stream),
            ),
        )
        for token_ids in prompts
    ]
    check_logprobs(requests, "logprobs", bool(body.stream))
    return requests, starts


def of_chat(body: ChatBody, loaded: Loaded, settings: ServerSettings) -> Request:
    """Return the request for the reply to a conversation.

    Raises:
        ApiError, InputError: a field does not fit.
    """
    _check_choices(1, body, settings)
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs must go with logprobs=true", "top_logprobs")
    most, name = body.max_completion_tokens, "max_completion_tokens"
    if body.max_tokens is not None:
        if most is not None and most != body.max_tokens:
            raise invalid("max_tokens must be left out beside max_completion_tokens", "max_tokens")
        most, name = body.max_tokens, "max_tokens"
    messages = [_message(message, place) for place, message in enumerate(body.messages)]
    _check_fits([message.content for message in messages], loaded, "messages")
    try:
        token_ids = loaded.layout.token_ids(messages)
    except MythosError as error:
        raise invalid(str(error), "messages") from None
    request = _request(
        body,
        loaded,
        Asked(
            token_ids=tuple(token_ids),
            most=most,
            usual=settings.chat_tokens,
            fields=("messages", name),
            choices=body.choices,
            answered=body.choices,
            thinking=_thinking(body, loaded, settings),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            echoed=False,
            streamed=bool(body.stream),
        ),
    )
    check_logprobs([request], "top_logprobs", bool(body.stream))
    return request


def allowed_loops(asked: int | None, loaded: Loaded, settings: ServerSettings) -> int | None:
    """Return the most loops of a token; None: the model's mean, where the server allows so many.

    Raises:
        ApiError: more are asked for than the server allows.
    """
    most = settings.max_loops
    if asked is None:
        return None if loaded.lm.model.config.mean_loops <= most else most
    if asked > most:
        raise invalid(f"loops={asked} must be at most {most}, this server's max_loops", "loops")
    return asked


def _thinking(body: Generation, loaded: Loaded, settings: ServerSettings) -> Thinking:
    return Thinking(
        loops=allowed_loops(body.loops, loaded, settings),
        halting=body.halting or "none",
        threshold=body.threshold,
        cache_policy=body.cache_policy or "per_loop",
    )


def _request(body: Generation, loaded: Loaded, asked: Asked) -> Request:
    most, constraint = tokens_to_make(asked, loaded), _constraint(body, loaded.grammars)
    if body.draft_loops is not None and constraint is not None:
        raise invalid("draft_loops must be left out with response_format", "draft_loops")
    return Request(
        token_ids=asked.token_ids,
        max_new_tokens=most,
        thinking=asked.thinking,
        sampling=Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=max(0, body.top_k or 0),
            top_p=1.0 if body.top_p is None else body.top_p,
            min_p=body.min_p or 0.0,
            seed=None if body.seed is None else body.seed & LARGEST_SEED,
        ),
        stop=body.stops,
        stop_at_end=not body.ignore_eos,
        choices=asked.choices,
        priority=-(body.priority or 0),  # as vLLM has it, lower comes first; the engine's is higher
        logprobs=asked.logprobs,
        prompt_logprobs=asked.echoed,
        constraint=constraint,
        draft_loops=body.draft_loops,
    )


def _prompts(body: CompletionBody, loaded: Loaded) -> tuple[list[list[int]], bool]:
    """Return the token ids of each prompt, and whether they were text."""
    prompt, tokenizer = "" if body.prompt is None else body.prompt, loaded.lm.tokenizer
    if isinstance(prompt, str):
        prompt = [prompt]
    if not prompt:
        raise invalid("prompt must hold a text or token ids, and not an empty list", "prompt")
    if isinstance(prompt[0], str):
        texts = [str(text) for text in prompt]
        for text in texts:
            _check_fits([text], loaded, "prompt")
        try:
            encoded = tokenizer.encode_batch(texts)
        except TokenizerError as error:
            raise invalid(str(error), "prompt") from None
        return [[tokenizer.end_id, *token_ids] for token_ids in encoded], True
    lists = [prompt] if isinstance(prompt[0], int) else prompt
    prompts = [[int(token_id) for token_id in token_ids] for token_ids in lists]
    for token_ids in prompts:
        if not token_ids:
            raise invalid("prompt must hold no empty list of token ids", "prompt")
        largest = max(token_ids)
        if largest >= tokenizer.vocab_size:
            raise invalid(
                f"prompt holds token id {largest}, and must hold ids below "
                f"vocab_size={tokenizer.vocab_size}",
                "prompt",
            )
    return prompts, False


def _count(prompt: str | Sequence[Any] | None) -> int:
    """Return how many prompts a body has."""
    if not prompt or isinstance(prompt, str) or isinstance(prompt[0], int):
        return 1
    return len(prompt)


def _check_fits(texts: Sequence[str], loaded: Loaded, field: str) -> None:
    """Refuse what cannot fit, however it is split, before any of it is tokenised."""
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if size > loaded.most_bytes:
        raise too_long(
            f"{field} has {size} bytes, and must have at most {loaded.most_bytes}: more have no "
            f"room within max_model_len={loaded.max_length}",
            field,
        )


def _check_choices(prompts: int, body: Generation, settings: ServerSettings) -> None:
    if prompts * body.choices > settings.max_choices:
        raise invalid(
            f"n={body.choices} times {prompts} prompts must be at most {settings.max_choices}, "
            "this server's max_choices: ask for fewer at a time",
            "n",
        )


def _message(message: ChatMessage, place: int) -> Message:
    path = f"messages[{place}]"
    message.refuse_unknown(f"{path}.")
    if message.content is None:
        raise invalid(f"{path}.content must be text", f"{path}.content")
    if isinstance(message.content, str):
        return Message(message.role, message.content)
    for number, part in enumerate(message.content):
        name = f"{path}.content[{number}]"
        if part.type != "text":
            raise invalid(
                f"{name}.type={part.type!r} must be 'text': the model reads nothing else",
                f"{name}.type",
            )
        if part.text is None:
            raise invalid(f"{name}.text must be given", f"{name}.text")
        part.refuse_unknown(f"{name}.")
    return Message(message.role, "".join(part.text or "" for part in message.content))


def _constraint(body: Generation, grammars: JsonGrammars) -> Constraint | None:
    form = body.response_format
    if form is None:
        return None
    if form.json_schema is not None and form.type != "json_schema":
        raise invalid(
            f"response_format.json_schema must be left out with type={form.type!r}: say "
            "type='json_schema'",
            "response_format.json_schema",
        )
    if form.type == "text":
        return None
    if form.type == "json_object":
        return grammars.any_object()
    if form.json_schema is None:
        raise invalid(
            "response_format.json_schema must be given with type='json_schema'",
            "response_format.json_schema",
        )
    schema = form.json_schema.schema_
    try:
        return grammars.obey({} if schema is None else schema)
    except InputError as error:
        raise invalid(str(error), "response_format.json_schema.schema") from None
