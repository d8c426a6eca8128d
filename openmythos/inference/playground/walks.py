"""Walks through rooms for the playground: read or drawn, solved, and told in plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, final

import numpy as np
from jaxtyping import Int64
from pydantic import Field

from openmythos.config import HaltingKind
from openmythos.errors import CheckpointError
from openmythos.inference.reasoner import Reasoner, Trace, load_reasoner
from openmythos.inference.server.errors import ApiError, invalid
from openmythos.inference.server.schemas import Body
from openmythos.inference.shipped import find_model
from openmythos.inference.thinking import Thinking
from openmythos.tasks.rooms import DOORS, HOUSE, ROOMS, WAIT, WORDS, read_walk

MOST_WORDS, MOST_LOOPS = 128, 256
"""Longest walk, and most loops to solve it."""


class WalkBody(Body):
    """The body of `POST /v1/playground/walk`."""

    walk: Annotated[str, Field(max_length=4096)] | None = None
    """A room and doors, in words; without it one is drawn."""
    hops: Annotated[int, Field(ge=0, lt=MOST_WORDS)] | None = None
    """Doors of the walk that is drawn; default: 12."""
    waits: Annotated[int, Field(ge=0, lt=MOST_WORDS)] = 0
    """Waits strewn over it."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Of the walk that is drawn."""
    loops: Annotated[int, Field(ge=1, le=MOST_LOOPS)] | None = None
    """Most loops; default: as many as suffice for the walk."""
    halting: HaltingKind = "none"
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None


@final
class Walks:
    """Solves walks with a reasoner that is loaded when it is first asked.

    Args:
        name: the reasoner's, or its folder; it may be missing.
    """

    def __init__(self, name: str | Path) -> None:
        self._name = name
        self._reasoner: Reasoner | None = None

    def describe(self) -> dict[str, Any]:
        """Return a walk's words and limits, and what is missing where there is no reasoner."""
        here = find_model(self._name).is_dir()
        return {
            "missing": None if here else str(self._name),
            "rooms": ROOMS,
            "doors": DOORS,
            "wait": WAIT,
            "max_words": MOST_WORDS,
            "max_loops": MOST_LOOPS,
        }

    def solve(self, body: WalkBody) -> dict[str, Any]:
        """Solve the walk that is given or drawn.

        Raises:
            ApiError: there is no reasoner, or no walk can be made of the body.
            InputError: the words are no walk, or the model cannot take it, the rule or its
                threshold.
        """
        token_ids = walk_of(body)
        if self._reasoner is None:
            try:
                self._reasoner = load_reasoner(self._name)
            except CheckpointError as error:
                raise ApiError(404, str(error), code="no_reasoner") from None
        enough = self._reasoner.enough_for(HOUSE.follow(token_ids))
        loops = min(MOST_LOOPS, enough) if body.loops is None else body.loops
        thinking = Thinking(loops=loops, halting=body.halting, threshold=body.threshold)
        return plain_values(self._reasoner.solve(token_ids, thinking))


def walk_of(body: WalkBody) -> Int64[np.ndarray, "1 sequence"]:
    """Return the token ids of the walk that is given or drawn.

    Raises:
        ApiError: both are asked for, or the walk is too long.
        InputError: it is no walk.
    """
    if body.walk is not None:
        if body.hops is not None or body.waits:
            raise invalid("walk must be left out with hops or waits, which draw one", "walk")
        token_ids = read_walk(body.walk)
    else:
        hops = 12 if body.hops is None else body.hops
        random = np.random.default_rng(body.seed)
        token_ids = HOUSE.chains(random, 1, hops, hops + body.waits).token_ids
    if token_ids.shape[1] > MOST_WORDS:
        raise invalid(
            f"walk has {token_ids.shape[1]} words, must have at most {MOST_WORDS}: shorten it",
            "walk",
        )
    return token_ids


def plain_values(trace: Trace) -> dict[str, Any]:
    """Return a trace in plain values: rooms by their numbers, a walk's words as they are."""
    return {
        "walk": [WORDS[token_id] for token_id in trace.chain.token_ids[0].tolist()],
        "truth": trace.chain.answers[0].tolist(),
        "hops": trace.chain.hops[0].tolist(),
        "beliefs": trace.beliefs.tolist(),
        "stopped": trace.stopped.tolist(),
        "solved": trace.solved,
    }
