"""Whether modules are still what a description of them rests on: asked before every native call.

For one token of a small model this is a good part of all that Python does, so its loops run in C.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as every_module

from openmythos.model.int8 import Int8Weight
from openmythos.model.native.mirrored import code_of, kinds_of


class Watch:
    """Modules, and how they were."""

    def __init__(self, modules: Sequence[nn.Module], called: Sequence[nn.Module]) -> None:
        """Look at them.

        Args:
            modules: what they hold, what their tensors are, and the functions of their classes that
                the native code stands for, may not change.
            called: those whose calls nobody may begin, or cease, to watch.
        """
        held: list[tuple[dict[str, Any], str, Any]] = []
        for module in modules:
            for table in (module._modules, module._parameters, module._buffers):
                held += [(table, name, part) for name, part in table.items()]
            own = vars(module)  # a norm's eps, how many experts a router chooses
            held += [(own, n, part) for n, part in own.items() if n[0] != "_" and n != "training"]
        tensors = [part for _, _, part in held if isinstance(part, Tensor)]
        int8 = [x for x in tensors if isinstance(x, Int8Weight)]
        inside = [(x, name) for x in int8 for name in ("numbers", "scale")]
        held += [(vars(x), name, getattr(x, name)) for x, name in inside]
        self._code = code_of(*kinds_of(modules), *dict.fromkeys(map(type, int8)))
        self.written = self._code.written
        """Whether the modules' classes do what the native code knows."""
        self._tables = [table for table, _, _ in held]
        self._names = [name for _, name, _ in held]
        self._parts = [part for _, _, part in held]
        self._tensors = [x for x in tensors if not isinstance(x, Int8Weight)]
        self._tensors += [getattr(x, name) for x, name in inside]
        self._lay = self._look()
        self._fields = [vars(module) for module in modules]
        self._counts = list(map(len, self._fields))
        self._hooks = hooks_of(called)
        self._hooked = list(map(len, self._hooks))

    @property
    def hooked(self) -> bool:
        """Whether anybody watched a call."""
        return any(self._hooked)

    def stands(self) -> bool:
        """Whether nothing was moved, replaced, added or hooked since."""
        if not self._code.stands() or not all(
            map(is_, map(dict.get, self._tables, self._names), self._parts)
        ):
            return False
        if list(map(len, self._fields)) != self._counts:  # a function of a module's own is one more
            return False
        return list(map(len, self._hooks)) == self._hooked and self._look() == self._lay

    def _look(self) -> list[Any]:
        """How the tensors lie: addresses, sizes, strides, and what their numbers are."""
        xs = self._tensors
        return [
            *map(Tensor.data_ptr, xs),
            *map(Tensor.size, xs),
            *map(Tensor.stride, xs),
            *map(_DTYPE, xs),
        ]


_DTYPE = attrgetter("dtype")


def hooks_of(modules: Sequence[nn.Module]) -> list[dict[int, Any]]:
    """Return the tables of hooks that see or change calls: each module's, and those of all."""
    own = [
        table for module in modules for table in (module._forward_hooks, module._forward_pre_hooks)
    ]
    return [*own, every_module._global_forward_hooks, every_module._global_forward_pre_hooks]
