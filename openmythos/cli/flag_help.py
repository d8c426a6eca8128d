"""What --help says: the command's text, each flag's docstring as a paragraph, where MODEL stands.

tyro takes a docstring from the source with its indentation, so that its line breaks would stay. The
command's own it would not wrap.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator
from types import MappingProxyType

from openmythos.cli.loop_colours import colours_wanted

HELP = "help"  # where tyro looks before it reads the source
_LAST = re.compile(r"^(usage: .*)(\[OPTIONS\]) (.+)$", re.MULTILINE)
"""A usage line that names last what stands without a flag."""


def fill_help(kind: type) -> None:
    """Give every field of a dataclass, and of the dataclasses in it, its docstring as its help."""
    texts = dict(_docstrings(kind))
    for field in dataclasses.fields(kind):
        if field.name in texts and HELP not in field.metadata:
            field.metadata = MappingProxyType({**field.metadata, HELP: texts[field.name]})
    for inner in typing.get_type_hints(kind).values():
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            fill_help(inner)


DESCRIPTION = "(description)"
"""What stands in tyro's page where the command's text will."""


@contextlib.contextmanager
def printed_page(description: str) -> Iterator[None]:
    """Print a page with its description, and MODEL before the flags.

    Of those, one with several values would take MODEL, too.
    """
    page = _Page()
    try:
        with contextlib.redirect_stdout(page):
            yield
    finally:
        text = _LAST.sub(r"\1\3 \2", page.getvalue(), count=1)
        width = shutil.get_terminal_size().columns
        sys.stdout.write(text.replace(DESCRIPTION, wrapped(description, width), 1))


def wrapped(text: str, width: int) -> str:
    """Wrap the paragraphs of a text; lines that begin with a space, such as examples, stay."""
    lines: list[str] = []
    for prose, group in itertools.groupby(text.strip().splitlines(), _is_prose):
        if prose:
            words = " ".join(group)
            lines += textwrap.wrap(words, width, break_long_words=False, break_on_hyphens=False)
        else:
            lines += group
    return "\n".join(lines)


def _is_prose(line: str) -> bool:
    return bool(line) and not line.startswith(" ")


class _Page(io.StringIO):
    """A page that is painted as it would be where it ends up."""

    def __init__(self) -> None:
        super().__init__()
        self._terminal = colours_wanted()

    def isatty(self) -> bool:
        return self._terminal


def _docstrings(kind: type) -> Iterator[tuple[str, str]]:
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(inspect.cleandoc(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                yield field.target.id, " ".join(str(after.value.value).split())
