"""What is said of flags that do not fit: one sentence, made of tyro's box of several lines."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from openmythos.cli.flags import EMPTY, flags_of
from openmythos.errors import ConfigError

WITH_MODEL = ("bench", "eval", "export", "info")
"""Commands with a MODEL and with flags of several values, which may take it for one of them."""

KINDS = {"INT": "an integer", "FLOAT": "a number", "PATH": "a path", "STR": "a text"}
_EDGES = "╭╮╰╯│─+|- \n"
_RULE = re.compile(r"[─-]{6,}\W*$", re.MULTILINE)
"""A line across the box, or the end of its first line; plain where there is no terminal."""


def in_one_sentence(
    command: str, settings: type, arguments: list[str], parse: Callable[[], Any]
) -> Any:
    """Parse flags; where they do not fit, raise one sentence in place of what was printed.

    Args:
        command: its name.
        settings: its dataclass, from which the flags are read.
        arguments: what was typed.
        parse: what reads them, and prints a box and exits where they do not fit.

    Raises:
        ConfigError: a flag does not exist, or its value does not fit.
    """
    if {"-h", "--help"} & set(arguments):
        return parse()
    printed = io.StringIO()
    try:
        with _wide(), contextlib.redirect_stderr(printed):
            return parse()
    except SystemExit as left:
        if not left.code:
            raise
        raise ConfigError(sentence(command, settings, printed.getvalue(), arguments)) from None


def did_you_mean(word: str, words: Iterable[str], shown: str = "{}") -> str:
    """Return the end of a sentence that names what is spelled like a word; nothing is like some."""
    near = get_close_matches(word, list(words), n=1)
    return f": did you mean {shown.format(near[0])}?" if near else ""


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    """Let nothing that is printed be wrapped."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before


def sentence(command: str, settings: type, box: str, arguments: Sequence[str]) -> str:
    """Return what a box says, as `name=value must ...: see openmythos COMMAND --help`."""
    parts = [part for part in _RULE.split(box) if part.strip(_EDGES)]
    title = 1 if len(parts) > 1 and "\n" not in parts[0].strip(_EDGES) else 0
    lines = [line.strip(_EDGES) for line in parts[title].splitlines()] if parts else []
    text = " ".join(line for line in lines if line)
    of_ours = re.match(r"Error parsing [\w.-]+: (?P<said>\w+=.* must .*)", text)
    if of_ours:
        return of_ours["said"]
    see = f": see openmythos {command} --help"
    empty = re.match(rf"Error parsing (?:--|\[)?([\w.-]+)\]?: .*{EMPTY}", text)
    if empty:
        return f"{_name(empty[1]).lower()}='' must be a path: this folder is called ."
    choice = re.match(
        r"invalid choice (.+) for argument '--([\w.-]+)'\. Expected one of \((.+)\)", text
    )
    if choice:
        names = [name.strip("' ,") for name in choice[3].split(", ")]
        right = ", ".join(name for name in names if name != "None")
        hint = _model_taken(command, choice[2], arguments)
        return f"{_name(choice[2])}={choice[1]} must be one of {right}{hint}"
    # What was typed stands in quotes; in brackets without them, tyro names the form of a value.
    value = re.match(
        r"Error parsing --([\w.-]+): .*?(?:\[(['\"].+?['\"])\]|: (['\"].*['\"]))", text
    )
    if value:
        kind = re.search(rf"^\W*--{re.escape(value[1])} (\S+)", box, re.MULTILINE)
        hint = _model_taken(command, value[1], arguments)
        return f"{_name(value[1])}={value[2] or value[3]} must be {_kinds(kind)}{hint or see}"
    missing = re.match(r"Missing value for argument '--([\w.-]+)'", text)
    if missing:
        return f"--{missing[1]} must be followed by a value{see}"
    absent = re.match(r"Missing from [^:]+: (\w+)", text)
    if absent:
        return f"{absent[1].lower()} must be given{see}"
    unknown = re.match(r"Unrecognized options: ?(.*)", text)
    if unknown:
        first = unknown[1].split(", ")[0] or "''"
        near = _spelled_alike(settings, first) or see
        said = f"{first} is no flag of {command}, nor expected there{near}"
        return _one_too_many(settings, first, arguments, see) or said
    return f"{text.rstrip('.')}{see}"


def _spelled_alike(settings: type, flag: str) -> str:
    """Name the flag that was meant, where one is spelled much like what was typed."""
    if not flag.startswith("--"):
        return ""
    typed = flag[2:].partition("=")[0].replace("_", "-")
    return did_you_mean(typed, flags_of(settings), "--{}")


def _one_too_many(settings: type, word: str, arguments: Sequence[str], see: str) -> str | None:
    """Say that a flag takes one value, where a word stands behind the flag's own."""
    if word.startswith("--") or word not in arguments:
        return None
    before = " ".join(arguments[: arguments.index(word)][-2:])
    found = re.fullmatch(r"(?:.* )?--([\w.-]+)[ =](.+)", before)
    flag = flags_of(settings).get(found[1].replace("_", "-")) if found else None
    if found is None or flag is None or flag.takes != "one":
        return None
    return f"{_name(found[1])}={found[2]!r}, {word!r} must be one {flag.what}{see}"


def _model_taken(command: str, flag: str, arguments: Sequence[str]) -> str:
    """Say where MODEL stands, where a flag of several values may have taken it; else nothing."""
    named = f"--{flag}"
    if command not in WITH_MODEL or named not in arguments or not arguments[0].startswith("-"):
        return ""
    after = arguments[len(arguments) - list(reversed(arguments)).index(named) :]
    values = list(itertools.takewhile(lambda word: not word.startswith("--"), after))
    return f": give MODEL before {named}" if len(values) > 1 else ""


def _name(flag: str) -> str:
    return flag.replace("-", "_")


def _kinds(found: re.Match[str] | None) -> str:
    """What a flag takes, in words: from `{None}|INT` or `FLOAT [FLOAT ...]`."""
    said = [words for kind, words in KINDS.items() if found and kind in found[1]]
    return " or ".join(said) or "of another form"
