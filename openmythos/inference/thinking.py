"""How deep each token is thought about: what a caller of generation may choose. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from openmythos.config import CachePolicy, HaltingKind, MythosConfig


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """Depth of every token; the model checks the values, because a rule knows its own range."""

    loops: int | None = None
    """Most loops a token takes, 1 or more; may exceed the trained depth. Default: the model's
    mean."""
    halting: HaltingKind = "none"
    """When a token leaves the core before: never, by the learned gate, when its state (delta) or
    its distribution (kl) stops moving, or by Graves' rule (act)."""
    threshold: float | None = None
    """The rule's bound. Default: its own, which the gate learns in training."""
    cache_policy: CachePolicy = "per_loop"
    """A cache slot for every loop, as trained, or only for the last: as many times smaller."""

    def loops_of(self, config: MythosConfig) -> int:
        """Return the most loops that a token of this model takes."""
        return config.mean_loops if self.loops is None else self.loops

    def slots_of(self, config: MythosConfig) -> int:
        """Return the slots that a model's cache begins with: it grows where they are too few.

        Where a rule ends tokens, few loops may do.
        """
        loops = self.loops_of(config)
        return loops if self.halting == "none" else min(loops, config.mean_loops)
