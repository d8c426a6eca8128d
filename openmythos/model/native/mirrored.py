"""The functions whose work the native code does by itself, and whether they still are as it knows.

A class or a module whose function was replaced, or a file that was edited, computes something else
than the C code: torch then does the work. `mirrored.json` has a digest of each function's source.
After an edit that the C code has followed, or that changes no result, write it anew with
`python -m openmythos.model.native.mirrored`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from importlib import import_module
from itertools import repeat
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn import functional as F

PACKAGE = "openmythos.model."
DIGESTS = Path(__file__).with_name("mirrored.json")

MIRRORED = {
    "adapters": "loop_linear LoopLora.forward LoopLinear.forward",
    "attention": "rotate rms_norm GroupedQueryAttention.forward LatentAttention.forward "
    "LatentAttention._latent LatentAttention._query LatentAttention._maps "
    "LatentAttention._attend_absorbed LatentAttention._attend_expanded",
    "cache": "Store.update",
    "core": "Core.forward Core.first_state Core.one_loop Core._together Core._in_step",
    "experts": "loop_linear grouped_linear Router.forward Router._scores Experts.forward "
    "Experts._sorted Experts._one_by_one",
    "feed_forward": "swiglu relu2 FeedForward.forward",
    "halting": "LearnedExit.forward Gate.start Gate.decide Gate.output "
    "RelativeChange.start RelativeChange.decide RelativeChange.output",
    "injection": "Decay.A LTI.A LTI.prepare LTI.forward Free.prepare Free.forward "
    "Add.prepare Add.forward NoInjection.prepare NoInjection.forward",
    "int8": "Int8Weight.dense",
    "layer": "Layer.forward Layer._residual",
    "native.linear": "FewRowsLinear.forward",
    "norm": "inverse_rms rms_norm RMSNorm.forward",
    "span": "Span.causal_mask Place.keep Place.attend",
    "transformer": "OpenMythos.before_core OpenMythos.after_core OpenMythos.readout",
}
"""By module: its functions, those that it takes from others, and those of its classes."""

CACHED = "Layer"
"""The class that all of `CACHES`, modules without layers of their own, belongs to."""
CACHES = ("cache", "span")

TORCH = (
    *((F, "linear"), (F, "scaled_dot_product_attention"), (F, "silu")),
    *((nn.Embedding, "forward"), (nn.Module, "__call__")),
)
"""What somebody may replace in torch to see or change what layers do."""

_torchs = [getattr(owner, name) for owner, name in TORCH]


class Code:
    """The functions that some classes rest on, as they were at one time."""

    def __init__(self, kinds: Collection[type]) -> None:
        ours, torchs = list(_places(kinds)), list(zip(TORCH, _torchs, strict=True))
        if not any(kind.__name__ == CACHED for kind in kinds):
            torchs = []
        self._owners = [owner for owner, _, _ in ours] + [owner for (owner, _), _ in torchs]
        self._names = [name for _, name, _ in ours] + [name for (_, name), _ in torchs]
        self._functions = self._look()
        own, others = self._functions[: len(ours)], self._functions[len(ours) :]
        known = all(map(is_mirrored, kinds))
        known &= all(_is_ours(f, path) for f, (_, _, path) in zip(own, ours, strict=True))
        same = others == [function for _, function in torchs]
        self.written = known and same and not _edited(own)
        """Whether all are those that the native code knows, and all classes ours."""

    def stands(self) -> bool:
        """Whether all are still the same."""
        return self._look() == self._functions

    def _look(self) -> list[Any]:
        return list(map(getattr, self._owners, self._names, repeat(None)))


_codes: dict[tuple[type, ...], Code] = {}


def code_of(*kinds: type) -> Code:
    """Return the functions that these classes rest on, as they are now."""
    found = _codes.get(kinds)
    if found is None or not found.stands():
        found = _codes[kinds] = Code(kinds)
    return found


def kinds_of(modules: Iterable[nn.Module]) -> tuple[type, ...]:
    """The modules' classes and what these are subclasses of, each once, without those of others."""
    kinds = dict.fromkeys(kind for module in modules for kind in type(module).__mro__)
    return tuple(kind for kind in kinds if is_mirrored(kind))


def is_named(kind: type, path: str) -> bool:
    """Whether a class is the one of this path in our files, as `layer.Layer`, and no subclass."""
    return f"{kind.__module__}.{kind.__qualname__}" == PACKAGE + path


@cache
def is_mirrored(kind: type) -> bool:
    """Whether a class is one of those whose work the native code does."""
    if not kind.__module__.startswith(PACKAGE):
        return False
    module, name = kind.__module__.removeprefix(PACKAGE), kind.__name__
    return any(path.startswith(f"{name}.") for path in MIRRORED.get(module, "").split())


def _places(kinds: Iterable[type]) -> Iterator[tuple[Any, str, str]]:
    """Where the functions stand that these classes rest on: owner, name, and path in the file."""
    wanted: dict[str, set[str]] = {}
    for kind in filter(is_mirrored, kinds):
        module = kind.__module__.removeprefix(PACKAGE)
        owners = "", kind.__name__
        if kind.__name__ == CACHED:
            wanted |= {module: set(MIRRORED[module].split()) for module in CACHES}
        for path in MIRRORED[module].split():
            if path.rpartition(".")[0] in owners:
                wanted.setdefault(module, set()).add(path)
    for module, paths in wanted.items():
        for path in sorted(paths):
            owner, _, name = path.rpartition(".")
            home = import_module(PACKAGE + module)
            yield getattr(home, owner) if owner else home, name, path


def _inner(function: Any) -> FunctionType | None:
    """The function as it is written; None: it is none, or another stands around it.

    Checks of shapes and types, which tests put around every function, change no result.
    """
    if isinstance(function, property):
        function = function.fget
    if isinstance(function, MethodType):
        function = function.__func__
    while isinstance(function, FunctionType) and _module_of(function).startswith("jaxtyping."):
        function = getattr(function, "__wrapped__", None)
    return function if isinstance(function, FunctionType) else None


def _module_of(function: FunctionType) -> str:
    """Where a function was written, whatever it says of itself."""
    return str(function.__globals__.get("__name__"))


def _is_ours(function: Any, path: str) -> bool:
    """Whether a function is the one of this path in one of our files."""
    inner = _inner(function)
    if inner is None or not _module_of(inner).startswith(PACKAGE):
        return False
    return inner.__code__.co_qualname == path


def _edited(functions: Iterable[Any]) -> bool:
    """Whether the source of any of them is not what it was when the native code was written."""
    return any(_is_edited(inner) for function in functions if (inner := _inner(function)))


@cache
def _is_edited(function: FunctionType) -> bool:
    """Compare a function with its digest, and say once where it differs.

    Where source or digests are not there, as in an application in one file, nothing was edited.
    """
    name, digest = _name(function), _digest(function)
    if digest is None or _digests().get(name, digest) == digest:
        return False
    warnings.warn(
        f"{name} was edited, but not the compiled code that does the same work for few rows on the "
        "CPU: torch does it, more slowly. Change openmythos/model/native/layer.c alike, then say "
        f"python -m {PACKAGE}native.mirrored",
        stacklevel=2,
    )
    return True


@cache
def _digests() -> dict[str, str]:
    """The digests that were written, by function."""
    try:
        found: dict[str, str] = json.loads(DIGESTS.read_text(encoding="utf-8"))
    except OSError:
        return {}
    return found


def _name(function: FunctionType) -> str:
    return f"{_module_of(function)}.{function.__code__.co_qualname}"


def _digest(function: FunctionType) -> str | None:
    """A digest of a function's source; None where there is none."""
    try:
        source = inspect.getsource(function.__code__)
    except OSError:
        return None
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def digests() -> dict[str, str | None]:
    """Return the digests of all functions as they are now."""
    found: dict[str, str | None] = {}
    for module, paths in MIRRORED.items():
        for path in paths.split():
            function: Any = import_module(PACKAGE + module)
            for part in path.split("."):
                function = getattr(function, part)
            inner = _inner(function)
            assert inner is not None
            found[_name(inner)] = _digest(inner)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    DIGESTS.write_text(json.dumps(digests(), indent=2) + "\n", encoding="utf-8")
