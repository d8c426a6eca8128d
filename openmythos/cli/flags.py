"""What each flag of a command takes, read from its settings, and which of them were typed."""

from __future__ import annotations

import dataclasses
import typing
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from openmythos.errors import ConfigError, InputError

WORDS: dict[Any, str] = {Path: "file or folder", int: "integer", float: "number"}
EMPTY = "the path is empty"
"""What tyro's box then says, whatever the flag."""


class Flag(NamedTuple):
    """One flag of a command."""

    takes: Literal["nothing", "one", "several", "again"]
    """Values: none, one, as many as follow, or one each time that it is given."""
    what: str
    """A value, in words."""


def flags_of(settings: type, prefix: str = "", *, switches: bool = True) -> dict[str, Flag]:
    """Return the flags of a settings dataclass, and of those in it, by their names without `--`.

    Args:
        settings: the dataclass.
        prefix: what their names begin with.
        switches: whether a bool is a flag without a value.
    """
    found: dict[str, Flag] = {}
    hints = typing.get_type_hints(settings, include_extras=True)
    for field in dataclasses.fields(settings):
        kind, marks = _apart(hints[field.name])
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(kind):
            within = "" if any(getattr(mark, "name", None) == "" for mark in marks) else f"{name}."
            off = tyro.conf.FlagConversionOff in marks
            found |= flags_of(kind, within, switches=switches and not off)  # type: ignore[arg-type]
        elif not {tyro.conf.Positional, tyro.conf.Suppress} & set(marks):
            found[name] = _flag(kind, marks, switches)
    return found


def _apart(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type and what it is annotated with."""
    if typing.get_origin(hint) is Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def _flag(kind: Any, marks: tuple[Any, ...], switches: bool) -> Flag:
    kinds = (kind, *typing.get_args(kind))
    what = next((word for kind, word in WORDS.items() if kind in kinds), "value")
    if tyro.conf.UseAppendAction in marks:
        return Flag("again", what)
    if any(typing.get_origin(one) is tuple for one in kinds):
        return Flag("several", what)
    return Flag("nothing" if kind is bool and switches else "one", what)


def typed(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the flags that were typed, such as `text_field`, as often as they were.

    A value does not show whether it was typed.
    """
    flags = (argument[2:] for argument in arguments if argument.startswith("--"))
    return tuple(flag.partition("=")[0].replace("-", "_") for flag in flags)


def refuse_repeats(settings: type, arguments: Sequence[str]) -> None:
    """Refuse a flag that is given twice, of which only the last would count.

    Raises:
        ConfigError: there is one.
    """
    counts = {name: count for name, count in Counter(typed(arguments)).items() if count > 1}
    if not counts:
        return
    flags = flags_of(settings)
    for name, count in counts.items():
        flag = flags.get(name.replace("_", "-"))
        if flag is None or flag.takes in ("nothing", "again"):
            continue
        all_at_once = "give all of its values behind one"
        remedy = all_at_once if flag.takes == "several" else f"it takes one {flag.what}"
        raise ConfigError(
            f"--{name.replace('_', '-')} must be given once, and is given {count} times: {remedy}"
        )


def refuse_unused(given: Collection[str], unused: Iterable[str], why: str) -> None:
    """Refuse flags that were typed and would change nothing.

    Args:
        given: names of the flags that were typed.
        unused: names of those that change nothing.
        why: how the sentence goes on behind `must be left out`.

    Raises:
        InputError: one of them was typed.
    """
    for name in unused:
        if name in given:
            raise InputError(f"{name} must be left out {why}")


def no_empty_paths() -> ConstructorRegistry:
    """Return a rule for tyro by which no path is empty: it would mean the folder one is in."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=_path,
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda path: [str(path)],
        )

    return registry


def _path(words: list[str]) -> Path:
    if not words[0]:
        raise ValueError(EMPTY)
    return Path(words[0])
