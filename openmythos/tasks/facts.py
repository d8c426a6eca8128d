"""Facts and chains of them: which facts may stand in a chain is decided fact by fact.

A fact says where a relation leads from an entity; tails are random, so none can be guessed from
another. Most facts occur alone and in chains, some alone only, and some are kept back to be added
to a finished model. Who uses a fact in a chain that was seen alone only has one look-up for both
(Kohli et al. 2026, arXiv 2604.07822; Wang et al. 2024, arXiv 2405.15071). Some pairs of relations
never follow one another in ordinary chains.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Int64

from openmythos.errors import InputError
from openmythos.tasks.hops import Chains

Kind = Literal["chained", "alone", "later"]
"""A fact that chains use; one that is seen alone only; one that is not seen before the end."""

Pairs = Literal["usual", "apart", "any"]
"""Which relations may follow each other: those of training, those kept apart, or all."""


@dataclass(frozen=True)
class FactTask:
    """Entities, relations, and a fact for each two of them.

    Token ids: the entities from 0, then the relations, then the no-op, which leaves one where one
    stands.
    """

    entities: int = 50
    relations: int = 20
    alone: float = 0.2
    """Share of the facts that are seen alone only."""
    later: int = 50
    """Facts that are kept back."""
    apart: float = 0.1
    """Share of the pairs of relations that ordinary chains do not have."""
    seed: int = 0
    """Of the facts, and of what is kept apart."""

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            InputError: there are fewer than two entities, no relation, a share is not from 0 to
                below 1, or no fact is left for chains.
        """
        for name, least in (("entities", 2), ("relations", 1), ("later", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} must be {least} or more")
        for name in ("alone", "apart"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.count("alone") + self.later >= self.facts:
            raise InputError(
                f"alone={self.alone} and later={self.later} must leave some of the {self.facts} "
                "facts for chains: lower one of them"
            )

    @property
    def facts(self) -> int:
        """All facts of the graph."""
        return self.entities * self.relations

    @property
    def no_op(self) -> int:
        """The token that changes nothing."""
        return self.entities + self.relations

    @property
    def vocab_size(self) -> int:
        """Entities, relations and the no-op."""
        return self.no_op + 1

    def count(self, kind: Kind) -> int:
        """Return the number of facts of a kind."""
        alone = round(self.alone * self.facts)
        sizes = {"alone": alone, "later": self.later}
        return sizes.get(kind, self.facts - alone - self.later)

    @cached_property
    def tails(self) -> Int64[np.ndarray, "relations entities"]:
        """Where each relation leads from each entity."""
        random = np.random.default_rng([self.seed, 0])
        return random.integers(0, self.entities, (self.relations, self.entities))

    @cached_property
    def kinds(self) -> Int64[np.ndarray, "relations entities"]:
        """Each fact's kind, as its number in `Kind`."""
        names = get_args(Kind)
        sizes = [self.count(kind) for kind in names]
        random = np.random.default_rng([self.seed, 1])
        shuffled = random.permutation(np.repeat(np.arange(len(names)), sizes))
        return shuffled.reshape(self.relations, self.entities).astype(np.int64)

    @cached_property
    def kept_apart(self) -> Bool[np.ndarray, "relations relations"]:
        """Whether the second relation never follows the first in ordinary chains."""
        random = np.random.default_rng([self.seed, 2])
        order = random.permutation(self.relations**2)
        chosen = order < round(self.apart * self.relations**2)
        return chosen.reshape(self.relations, self.relations)

    def having(self, *kinds: Kind) -> Bool[np.ndarray, "relations entities"]:
        """Return which facts are of one of these kinds."""
        return np.isin(self.kinds, [get_args(Kind).index(kind) for kind in kinds])

    def lone(self, *kinds: Kind) -> Chains:
        """Return all facts of these kinds, each as a chain of one hop."""
        relations, entities = self.having(*kinds).nonzero()
        return self._answered(np.stack([entities, relations + self.entities], axis=1))

    def chains(
        self,
        random: np.random.Generator,
        count: int,
        kinds: tuple[Kind, ...],
        pairs: Pairs = "usual",
    ) -> Chains:
        """Draw chains, one hop for each of `kinds`, whose fact is of that kind.

        Each hop's relation is drawn evenly from those that the entity reached allows; a chain that
        comes to an entity which allows none is drawn again.

        Raises:
            InputError: `kinds` is empty, or no such chain turns up in a hundred draws of `count`.
        """
        if not kinds:
            raise InputError("kinds=() must name the kind of at least one hop")
        found: list[Int64[np.ndarray, "some sequence"]] = []
        for _ in range(100):
            found.append(self._walks(random, count, kinds, pairs))
            if sum(map(len, found)) >= count:
                return self._answered(np.concatenate(found)[:count])
        raise InputError(
            f"kinds={kinds} with pairs={pairs!r} must allow chains, but hardly any entity does: "
            "raise relations, alone, later or apart"
        )

    def _walks(
        self, random: np.random.Generator, count: int, kinds: tuple[Kind, ...], pairs: Pairs
    ) -> Int64[np.ndarray, "some sequence"]:
        """Draw `count` chains and return those that found a way."""
        at = random.integers(0, self.entities, count)
        tokens, alive = [at], np.ones(count, dtype=np.bool_)
        relation = np.zeros(count, dtype=np.int64)
        for hop, kind in enumerate(kinds):
            allowed = self.having(kind).T[at]  # (count, relations)
            if hop and pairs != "any":
                allowed = allowed & (self.kept_apart[relation] == (pairs == "apart"))
            relation = np.where(allowed, random.random(allowed.shape), -1).argmax(axis=1)
            alive &= allowed.any(axis=1)
            at = self.tails[relation, at]
            tokens.append(relation + self.entities)
        return np.stack(tokens, axis=1)[alive]

    def waiting(self, random: np.random.Generator, chains: Chains, slots: int) -> Chains:
        """Strew no-ops among the relations, at random places, so that there are `slots` of both.

        Raises:
            InputError: the chains are longer than that.
        """
        entities, relations = chains.token_ids[:, :1], chains.token_ids[:, 1:]
        count, hops = relations.shape
        if slots < hops:
            raise InputError(f"slots={slots} must be at least the chains' {hops} hops")
        places = random.random((count, slots)).argsort(axis=1)[:, :hops]
        spread = np.full((count, slots), self.no_op, dtype=np.int64)
        np.put_along_axis(spread, np.sort(places, axis=1), relations, axis=1)
        return self._answered(np.concatenate([entities, spread], axis=1))

    def _answered(self, token_ids: Int64[np.ndarray, "batch sequence"]) -> Chains:
        """Answer chains, each an entity and then relations or no-ops."""
        stay = np.arange(self.entities, dtype=np.int64)
        moves = np.concatenate([self.tails, stay[None]])  # the no-op stays
        answers = np.empty_like(token_ids)
        answers[:, 0] = token_ids[:, 0]
        for at in range(1, token_ids.shape[1]):
            answers[:, at] = moves[token_ids[:, at] - self.entities, answers[:, at - 1]]
        real = token_ids != self.no_op
        real[:, 0] = False
        return Chains(token_ids, answers, real.cumsum(axis=1))
