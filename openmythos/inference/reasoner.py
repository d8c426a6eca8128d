"""Solving a chain of hops, loop by loop: what the model believes after every pass of its core."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int64

from openmythos.config import HaltingKind
from openmythos.errors import CheckpointError, InputError
from openmythos.inference.shipped import REASONER, find_model
from openmythos.inference.thinking import Thinking
from openmythos.model.transformer import OpenMythos
from openmythos.tasks.hops import Chains
from openmythos.tasks.rooms import HOUSE


@dataclass(frozen=True)
class Trace:
    """How one chain was worked."""

    chain: Chains
    """A batch of one."""
    beliefs: Int64[np.ndarray, "loops sequence"]
    """The entity named at each place after each loop; once a place has stopped, it is kept."""
    stopped: Int64[np.ndarray, " sequence"]
    """Loops that each place took."""
    halting: HaltingKind = "none"
    """The rule that could stop a place before the budget did."""

    @property
    def right(self) -> Bool[np.ndarray, "loops sequence"]:
        """Which beliefs are true."""
        return self.beliefs == self.chain.answers

    @property
    def answer(self) -> int:
        """The entity named at the end."""
        return int(self.beliefs[-1, -1])

    @property
    def solved(self) -> bool:
        """Whether the end is right."""
        return bool(self.right[-1, -1])


class Reasoner:
    """A model trained on chains of hops through the house of `openmythos.tasks.rooms`."""

    def __init__(self, model: OpenMythos) -> None:
        if model.config.vocab_size != HOUSE.vocab_size:
            raise CheckpointError(
                f"model has vocab_size={model.config.vocab_size}, and must have {HOUSE.vocab_size} "
                "to reason: give a model trained on chains of hops"
            )
        self.model = model.eval()

    @torch.inference_mode()
    def solve(
        self, token_ids: Int64[np.ndarray, "1 sequence"], thinking: Thinking | None = None
    ) -> Trace:
        """Work one chain.

        Args:
            token_ids: an entity, then relations or no-ops.
            thinking: loops, halting rule and threshold; where it names no loops, as many as
                `enough` says. The cache's policy plays no part.

        Raises:
            InputError: not a chain, longer than the model's max_length, or loops below 1.
        """
        thinking = thinking or Thinking()
        chain = HOUSE.follow(token_ids)
        if token_ids.shape[1] > self.model.config.max_length:
            raise InputError(
                f"walk has {token_ids.shape[1]} words, and must have at most "
                f"max_length={self.model.config.max_length}: shorten it"
            )
        enough = self.enough_for(chain)
        out = self.model(
            torch.from_numpy(token_ids),
            enough if thinking.loops is None else thinking.loops,
            halting=thinking.halting,
            threshold=thinking.threshold,
            return_states=True,
        )
        entities = slice(0, HOUSE.entities)
        named = [self.model.decode(h)[0, :, entities].argmax(-1) for h in out.states]
        return Trace(chain, torch.stack(named).numpy(), out.loops[0].numpy(), thinking.halting)

    def enough_for(self, chain: Chains) -> int:
        """Return loops that suffice for a walk, as `enough` counts them."""
        hops = int(chain.hops[0, -1])
        return self.enough(hops, waits=chain.token_ids.shape[1] - 1 - hops)

    def enough(self, hops: int, waits: int = 0) -> int:
        """Return loops that suffice: one for each hop, a quarter more for each word, and eight.

        With them the shipped reasoner, on 30 walks each of 5, 10, 20, 40 and 60 hops, finds the end
        of 29 or 30 among up to 50 waits, of 27 to 30 among 70, of 24 to 28 among 100, of 7 to 17
        among 120, of 7 at most among 150. Three times as many loops mend none of the rest: its
        training had sequences of 128 words.
        """
        return max(self.model.config.mean_loops, hops + (hops + waits) // 4 + 8)


def load_reasoner(name: str | Path = REASONER) -> Reasoner:
    """Load a reasoner by name or folder; the one in the package by default.

    Raises:
        CheckpointError: there is none, or it is another kind of model.
    """
    folder = find_model(name)
    if not folder.is_dir():
        raise CheckpointError(f"model={str(name)!r} must be a model's folder or {REASONER!r}")
    return Reasoner(OpenMythos.from_pretrained(folder))
