"""Log-probabilities in the two shapes of OpenAI's API: four lists, or one entry a token."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from openmythos.training.tokenizer import Tokenizer

Top = Iterable[tuple[int, float]]
LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot write, as it does in OpenAI's API."""


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return how the API writes a token: its text, or its bytes where they are no whole characters.

    As OpenAI's does, so that U+FFFD never stands for what is only a part of a character.
    """
    content = tokenizer.decode_bytes([token_id])
    if not content:
        return tokenizer.name(token_id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class CompletionLogprobs:
    """The shape of completions. Text grows by pieces, so offsets are counted from the first."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._text = tokenizer, tokenizer.text_stream()
        self._offset = 0
        self._lists = self._empty()

    @staticmethod
    def _empty() -> dict[str, list[Any]]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token_id: int, logprob: float | None, top: Top) -> None:
        """Add a token, its log-probability (None for a prompt's first) and the likeliest ones."""
        text = token_text(self._tokenizer, token_id)
        self._lists["tokens"].append(text)
        self._lists["text_offset"].append(self._offset)
        self._offset += len(self._text.push(token_id))
        if logprob is None:
            self._lists["token_logprobs"].append(None)
            self._lists["top_logprobs"].append(None)
            return
        likeliest: dict[str, float] = {}
        for other, value in top:
            likeliest.setdefault(token_text(self._tokenizer, other), _finite(value))
        likeliest.setdefault(text, _finite(logprob))
        self._lists["token_logprobs"].append(_finite(logprob))
        self._lists["top_logprobs"].append(likeliest)

    def take(self) -> dict[str, list[Any]]:
        """Return what was added since the last time."""
        lists, self._lists = self._lists, self._empty()
        return lists


def chat_logprob(tokenizer: Tokenizer, token_id: int, logprob: float, top: Top) -> dict[str, Any]:
    """Return a token's entry in the shape of chat."""
    entry = _named(tokenizer, token_id, logprob)
    entry["top_logprobs"] = [_named(tokenizer, other, value) for other, value in top]
    return entry


def _named(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token_id),
        "bytes": list(tokenizer.decode_bytes([token_id])),
        "logprob": _finite(logprob),
    }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST
