"""From the messages of a conversation to the text that a model goes on with.

Our models know text and no roles. The plain layout sets what each user (or system) says on a new
line and lets each reply follow at once, which is what `openmythos chat` writes. A model that was
trained on another layout brings it as `chat_template.jinja` in its folder, in the form that
Hugging Face's tokenizers use: Jinja with `break` and `continue`, `tojson`, `raise_exception` and
`strftime_now`. An end mark that it writes out is the token; one in a message is text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from openmythos.errors import CheckpointError, InputError
from openmythos.training.run import MODEL

if TYPE_CHECKING:
    from jinja2 import Template

    from openmythos.training.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    """`assistant` is the model; every other role speaks to it."""
    content: str


def with_line(text: str, line: str) -> str:
    """Return `text` with `line` on a line of its own after it."""
    if line and text and not text[-1].isspace():
        text += "\n"
    return text + line


def plain_text(messages: Sequence[Message]) -> str:
    """Return a conversation in the plain layout."""
    text = ""
    for message in messages:
        is_reply = message.role == "assistant"
        text = text + message.content if is_reply else with_line(text, message.content)
    return text


class ChatLayout:
    """How a model wants its conversations: in the plain layout, or in that of its template.

    Args:
        tokenizer: the model's.
        template: text of a Jinja template; None is the plain layout.

    Raises:
        CheckpointError: the template is not one.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        # Stands for the end mark while the template is filled in: the mark itself, in a message,
        # is text, and nobody can write what is drawn anew in each process.
        self._end = f"\x00{secrets.token_hex(16)}\x00"
        self._template = None if template is None else _compiled(self._marked(template))

    @classmethod
    def of(cls, folder: Path, tokenizer: Tokenizer) -> ChatLayout:
        """The layout of the model (or run) in a folder.

        Raises:
            CheckpointError: its template is not one, or cannot be read.
        """
        for path in (folder / TEMPLATE, folder / MODEL / TEMPLATE):
            if path.is_file():
                try:
                    return cls(tokenizer, path.read_text(encoding="utf-8"))
                except (OSError, UnicodeDecodeError) as error:
                    raise CheckpointError(
                        f"template={str(path)!r} must be readable ({error}): write it again"
                    ) from error
        return cls(tokenizer)

    def token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt that a reply to `messages` follows.

        Raises:
            InputError: the template refuses the messages.
        """
        if self._template is None:
            return [self.tokenizer.end_id, *self.tokenizer.encode(plain_text(messages))]
        parts = self._filled_in(self._template, messages).split(self._end)
        token_ids = self.tokenizer.encode(parts[0])
        for part in parts[1:]:
            token_ids += [self.tokenizer.end_id, *self.tokenizer.encode(part)]
        return token_ids or [self.tokenizer.end_id]

    def _marked(self, template: str) -> str:
        """The template's own end marks, written out, are tokens: its author is trusted."""
        return template.replace(self.tokenizer.name(self.tokenizer.end_id), self._end)

    def _filled_in(self, template: Template, messages: Sequence[Message]) -> str:
        try:
            return template.render(
                messages=[{"role": m.role, "content": m.content} for m in messages],
                add_generation_prompt=True,
                bos_token=self._end,
                eos_token=self._end,
                raise_exception=_refuse,
                strftime_now=lambda form: datetime.now().strftime(form),
            )
        except Exception as error:  # noqa: BLE001 - a template is code that somebody else wrote
            raise InputError(
                f"messages must be a conversation that the model's template takes: {error}"
            ) from None


def _compiled(template: str) -> Template:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _as_json  # Jinja's own is for HTML
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise CheckpointError(
            f"template={TEMPLATE} must be a Jinja template ({error}): mend or delete it"
        ) from None


def _as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(sentence: str) -> NoReturn:
    """What a template calls as `raise_exception`."""
    raise InputError(sentence)
