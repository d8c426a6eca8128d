"""What --help says of each flag: the field's docstring as one paragraph.

tyro takes it from the source with its indentation, so that a docstring's own line breaks stay.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator
from types import MappingProxyType

HELP = "help"  # where tyro looks before it reads the source


def fill_help(kind: type) -> None:
    """Give every field of a dataclass, and of the dataclasses in it, its docstring as its help."""
    texts = dict(_docstrings(kind))
    for field in dataclasses.fields(kind):
        if field.name in texts and HELP not in field.metadata:
            field.metadata = MappingProxyType({**field.metadata, HELP: texts[field.name]})
    for inner in typing.get_type_hints(kind).values():
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            fill_help(inner)


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
