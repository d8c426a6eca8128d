"""What --help says: each flag's docstring as one paragraph, and where MODEL stands.

tyro takes a docstring from the source with its indentation, so that its line breaks would stay.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import re
import sys
import typing
from collections.abc import Iterator
from types import MappingProxyType

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


@contextlib.contextmanager
def model_first() -> Iterator[None]:
    """Print usage with MODEL before the flags, of which one with several values takes it, too."""
    page = _Page()
    try:
        with contextlib.redirect_stdout(page):
            yield
    finally:
        sys.stdout.write(_LAST.sub(r"\1\3 \2", page.getvalue(), count=1))


class _Page(io.StringIO):
    """A page that is painted as it would be where it ends up."""

    def __init__(self) -> None:
        super().__init__()
        self._terminal = sys.stdout.isatty()

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
