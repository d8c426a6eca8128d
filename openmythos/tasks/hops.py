"""Chains of hops: start at an entity, follow relation after relation, say where one stands.

Each relation is a random permutation of the entities, so that no suffix of a chain betrays the
answer (Kohli et al. 2026, arXiv 2604.07822), and the answer is asked for after every token. A
no-op token leaves one where one stands: with no-ops at random places, neither a token's position
nor the chain's length says how many hops it has behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from openmythos.errors import InputError


class Chains(NamedTuple):
    """A batch of chains, each an entity and then `slots` relations or no-ops."""

    token_ids: Int64[np.ndarray, "batch sequence"]
    answers: Int64[np.ndarray, "batch sequence"]
    """The entity one stands at after each token."""
    hops: Int64[np.ndarray, "batch sequence"]
    """Relations followed up to and with each token."""


@dataclass(frozen=True)
class HopTask:
    """Entities and the permutations between them.

    Token ids: the entities from 0, then the relations, then the no-op.
    """

    entities: int = 32
    relations: int = 16
    seed: int = 0
    """Of the permutations: the facts of this world."""

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            InputError: there are fewer than two entities, or no relation.
        """
        for name, least in (("entities", 2), ("relations", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} must be {least} or more")

    @property
    def no_op(self) -> int:
        """The token that changes nothing."""
        return self.entities + self.relations

    @property
    def vocab_size(self) -> int:
        """Entities, relations and the no-op."""
        return self.no_op + 1

    @cached_property
    def tails(self) -> Int64[np.ndarray, "relations entities"]:
        """Where each relation leads from each entity."""
        random = np.random.default_rng([self.seed, 0])
        rows = [random.permutation(self.entities) for _ in range(self.relations)]
        return np.stack(rows).astype(np.int64)

    def chains(
        self, random: np.random.Generator, count: int, hops: int, slots: int | None = None
    ) -> Chains:
        """Draw chains of `hops` relations spread over `slots` places, the rest of them no-ops.

        Raises:
            InputError: hops is below 0, or slots below hops.
        """
        slots = hops if slots is None else slots
        if not 0 <= hops <= slots:
            raise InputError(f"hops={hops} must be from 0 to slots={slots}")
        relations = random.integers(self.entities, self.no_op, (count, slots))
        if slots > hops:
            order = random.random((count, slots)).argsort(axis=1)
            relations[order >= hops] = self.no_op
        start = random.integers(0, self.entities, (count, 1))
        return self.follow(np.concatenate([start, relations], axis=1))

    def packed(
        self, random: np.random.Generator, count: int, length: int, hops: int, no_ops: float
    ) -> Chains:
        """Draw sequences of chains one after another, each beginning with its entity.

        A chain thus starts at any position and sees up to `length` tokens before it, so that a
        longer chain has no position or distance that training lacked.

        Args:
            random: source of the draws.
            count: sequences.
            length: tokens in each; the last chain is cut there.
            hops: of every other chain; those between have 1 to `hops`.
            no_ops: share of the chains that have no-ops strewn in, up to as many as hops.

        Raises:
            InputError: length or hops is below 1, or no_ops not from 0 to 1.
        """
        if min(length, hops) < 1 or not 0 <= no_ops <= 1:
            raise InputError(
                f"length={length} and hops={hops} must be 1 or more, no_ops={no_ops} from 0 to 1"
            )
        rows = [self._row(random, length, hops, no_ops) for _ in range(count)]
        return Chains(*(np.stack(parts) for parts in zip(*rows, strict=True)))

    def _row(
        self, random: np.random.Generator, length: int, hops: int, no_ops: float
    ) -> list[Int64[np.ndarray, " sequence"]]:
        """One packed sequence: token ids, answers, hops."""
        chains: list[Chains] = []
        while sum(chain.token_ids.shape[1] for chain in chains) < length:
            count = hops if len(chains) % 2 else int(random.integers(1, hops + 1))
            waits = int(random.integers(1, count + 1)) if random.random() < no_ops else 0
            chains.append(self.chains(random, 1, count, count + waits))
        return [np.concatenate(parts, axis=1)[0, :length] for parts in zip(*chains, strict=True)]

    def follow(self, token_ids: Int64[np.ndarray, "batch sequence"]) -> Chains:
        """Answer given chains.

        Raises:
            InputError: a chain does not begin with an entity or goes on with something else than
                relations and no-ops.
        """
        first, rest = token_ids[:, 0], token_ids[:, 1:]
        if not ((first >= 0) & (first < self.entities)).all():
            raise InputError(f"token_ids[:, 0] must be entities, 0 to {self.entities - 1}")
        if not ((rest >= self.entities) & (rest <= self.no_op)).all():
            raise InputError(
                f"token_ids[:, 1:] must be relations, {self.entities} to {self.no_op - 1}, or the "
                f"no-op {self.no_op}"
            )
        stay = np.arange(self.entities, dtype=np.int64)
        moves = np.concatenate([self.tails, stay[None]])  # the no-op stays
        answers = np.empty_like(token_ids)
        answers[:, 0] = first
        for at in range(rest.shape[1]):
            answers[:, at + 1] = moves[rest[:, at] - self.entities, answers[:, at]]
        real = np.zeros_like(token_ids)
        real[:, 1:] = rest != self.no_op
        return Chains(token_ids, answers, real.cumsum(axis=1))
