"""Replies that are JSON: a schema becomes a grammar that allows or forbids each next token.

llguidance walks the grammar over the tokenizer's bytes. The layout is fixed to that of Python's
`json.dumps`: a small model that may write any white space can write it without end.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, final

import llguidance
import numpy as np
from jaxtyping import UInt32
from llguidance import LLMatcher, LLTokenizer

from openmythos.errors import InputError
from openmythos.training.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LAYOUT: JsonCompileOptions = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "lenient": False,  # a keyword that cannot be kept is refused, not ignored
}


SCHEMA_PARTS = 5000
"""Objects and lists that a schema may have. A grammar is compiled by recursion, which each of them
may make one deeper: past the end of a stack the whole process would die."""
SCHEMA_BYTES = 1 << 17
"""Bytes that a schema may have as JSON: to compile so many takes some tenths of a second."""
TOO_COMPLEX = "schema is too complex to be kept"
"""How the sentence begins about a schema that can be compiled and then not be followed."""
STACK_BYTES = 256 << 20
"""Of the thread that compiles: twelve times what the deepest schemas of so many parts were seen to
take. Only what is used is ever in memory."""
_one_at_a_time = threading.Lock()


@final
class JsonGrammars:
    """Makes constraints from schemas, for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokens = LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer)))

    def obey(self, schema: dict[str, Any] | bool) -> JsonConstraint:
        """Return the constraint of a JSON schema; `True` allows every value.

        Raises:
            InputError: the schema is not valid, too large, or holds what cannot be guaranteed.
        """
        if schema is False:
            raise InputError("schema must be a JSON schema that allows something, is false")
        schema = {} if schema is True else schema
        if (parts := _parts(schema)) > SCHEMA_PARTS:
            raise InputError(
                f"schema must be a JSON schema of at most {SCHEMA_PARTS} objects and lists, has "
                f"{parts} or more"
            )
        text = _written(schema)
        if len(text) > SCHEMA_BYTES:
            raise InputError(
                f"schema must be a JSON schema of at most {SCHEMA_BYTES} bytes, has {len(text)}"
            )
        try:
            matcher = _on_a_deep_stack(
                lambda: LLMatcher(
                    self._tokens,
                    LLMatcher.grammar_from_json_schema(text, overrides=LAYOUT),
                    log_level=0,
                )
            )
        except ValueError as error:
            raise InputError(f"schema must be a JSON schema: {_line(str(error))}") from None
        if matcher.is_error():
            raise InputError(
                f"schema must be a JSON schema that can be kept: {_line(matcher.get_error())}"
            )
        constraint = JsonConstraint(matcher)
        constraint.copy().allowed()  # some schemas compile, and can then not be kept
        return constraint

    def any_object(self) -> JsonConstraint:
        """Return the constraint that holds for every JSON object."""
        return self.obey({"type": "object"})


@final
class JsonConstraint:
    """Where one text stands in its grammar: the engine's `Constraint`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> UInt32[np.ndarray, " words"]:
        """Return the tokens that may come next, as bits of uint32 words."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32)
        self._check()
        return mask

    def accept(self, token_id: int) -> None:
        """Go on by one token."""
        self._matcher.consume_token(token_id)
        self._check()

    def finished(self) -> bool:
        """Whether the JSON is whole and nothing can follow."""
        return self._matcher.is_stopped()

    def copy(self) -> JsonConstraint:
        """Return the same place, to go on from separately."""
        return JsonConstraint(self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(
                f"{TOO_COMPLEX} ({_line(self._matcher.get_error())}): ask for a simpler one"
            )


def _parts(schema: object) -> int:
    """Count objects and lists, to a few beyond `SCHEMA_PARTS`; nesting of any depth is fine."""
    count, rest = 0, [schema]
    while rest and count <= SCHEMA_PARTS:
        part = rest.pop()
        if isinstance(part, dict | list):
            count += 1
            rest.extend(part.values() if isinstance(part, dict) else part)
    return count


def _written(schema: dict[str, Any]) -> str:
    try:
        return json.dumps(schema)
    except (ValueError, RecursionError) as error:
        raise InputError(f"schema must be a JSON schema: {_line(str(error))}") from None


def _on_a_deep_stack(make: Callable[[], LLMatcher]) -> LLMatcher:
    """Return what a function makes in a thread of `STACK_BYTES`; its errors are raised here."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="openmythos-grammar") as pool:
        with _one_at_a_time:  # the size is the process's, until the thread has begun
            usual = threading.stack_size(STACK_BYTES)
            try:
                made = pool.submit(make)
            finally:
                threading.stack_size(usual)
        return made.result()


class _Vocabulary:
    """The tokenizer as llguidance wants to see one."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.end_id
        self._encode = tokenizer.encode
        self.tokens, self.special_token_ids = [], []
        for token_id in range(tokenizer.vocab_size):
            content = tokenizer.decode_bytes([token_id])
            if not content:  # 0xFF stands in no UTF-8 text, so no grammar reaches what begins so
                content = b"\xff" + tokenizer.name(token_id).encode()
                self.special_token_ids.append(token_id)
            self.tokens.append(content)

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _line(text: str) -> str:
    """The first line of a message, which may go on with the whole grammar."""
    return (text.strip().splitlines() or ["no reason given"])[0][:300]
