"""Whether a model's weights are still those with which cached pages were read."""

from __future__ import annotations

from operator import attrgetter

from openmythos.model.int8 import Int8Weight
from openmythos.model.native.watch import Watch
from openmythos.model.transformer import OpenMythos


class Weights:
    """A model's tensors, as they were at one time.

    Args:
        model: whose.
        native: whether `Paged.stands` says already if any outside the learned exits was replaced.
    """

    def __init__(self, model: OpenMythos, *, native: bool) -> None:
        exits = [part for gate in model.core.learned_exits().values() for part in gate.modules()]
        self._watch = Watch(exits if native else list(model.modules()), ())
        tensors = [*model.parameters(), *model.buffers()]
        int8 = [x for x in tensors if isinstance(x, Int8Weight)]
        inside = [part for x in int8 for part in (x.numbers, x.scale)]
        # A wrapper would take ten times as long to ask, and tensors that were made in inference
        # mode have no version.
        counted = [*(x for x in tensors if not isinstance(x, Int8Weight)), *inside]
        self._counted = [x for x in counted if not x.is_inference()]
        self._written = self._versions()

    def stands(self) -> bool:
        """Whether nothing was replaced, moved or written to since, as far as torch tells.

        It does not tell of what is written through `tensor.data`.
        """
        return self._versions() == self._written and self._watch.stands()

    def _versions(self) -> int:
        """How often all of them were written to; each number only grows."""
        return sum(map(_VERSION, self._counted))


_VERSION = attrgetter("_version")
