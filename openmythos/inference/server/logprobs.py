"""Log-probabilities in the two shapes of OpenAI's API: four lists, or one entry a token."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable
from typing import Any, final

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


@final
class Offsets:
    """Where each token's own text begins, in characters of the whole text.

    A token that leaves a character unfinished turns it into U+FFFD, which is text of the tokens
    before; one that goes on with a character begins where that one does.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0  # characters that are whole, or given up

    def copy(self, length: int) -> Offsets:
        """Return the same place among bytes, after so many characters of text."""
        other = Offsets(self._tokenizer)
        other._decoder.setstate(self._decoder.getstate())
        other._length = length
        return other

    def next(self, token_id: int) -> int:
        """Go on by a token, and return where its text begins."""
        content = self._tokenizer.decode_bytes([token_id])
        begun, _ = self._decoder.getstate()
        # One character: the first byte goes on with what is begun. Two: that has become U+FFFD.
        broken = len((begun + content[:1]).decode("utf-8", "replace")) - 1 if begun else 0
        start = self._length + broken
        self._length += len(self._decoder.decode(content))
        return start


class LogprobLists:
    """The shape of completions.

    Args:
        tokenizer: the model's.
        offsets: of the text so far; those of a new text where there is none.
    """

    def __init__(self, tokenizer: Tokenizer, offsets: Offsets | None = None) -> None:
        self._tokenizer, self._offsets = tokenizer, offsets or Offsets(tokenizer)
        self._lists = self._empty()

    @staticmethod
    def _empty() -> dict[str, list[Any]]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token_id: int, logprob: float | None, top: Top) -> None:
        """Add a token, its log-probability (None for a prompt's first) and the likeliest ones."""
        text = token_text(self._tokenizer, token_id)
        self._lists["tokens"].append(text)
        self._lists["text_offset"].append(self._offsets.next(token_id))
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
