"""The hop task in friendly words: a walk through a house of 32 rooms, each with 16 doors.

Every room has a door of each colour, and no two rooms' red doors lead to the same room: the
permutations of `HopTask`. So some doors, 27 of the 512, lead back into the room that they leave. To
wait is the no-op.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

import numpy as np
from jaxtyping import Int64

from openmythos.errors import InputError
from openmythos.tasks.hops import HopTask

# fmt: off
ROOMS = (
    "library", "kitchen", "garden", "cellar", "attic", "hall", "study", "chapel", "gallery",
    "stable", "tower", "bakery", "forge", "orchard", "pantry", "workshop", "nursery", "parlour",
    "armoury", "laundry", "balcony", "courtyard", "dungeon", "greenhouse", "observatory",
    "ballroom", "treasury", "barn", "brewery", "infirmary", "studio", "theatre",
)
DOORS = (
    "red", "orange", "yellow", "green", "blue", "violet", "white", "black", "grey", "brown",
    "pink", "gold", "silver", "bronze", "copper", "ivory",
)
# fmt: on
WAIT = "wait"

JOINING = frozenset(
    {"from", "the", "start", "in", "at", "take", "go", "through", "and", "then", "door"}
)

HOUSE = HopTask(entities=len(ROOMS), relations=len(DOORS), seed=0)
WORDS = (*ROOMS, *DOORS, WAIT)
"""The word of each token id."""


def read_walk(text: str) -> Int64[np.ndarray, "1 sequence"]:
    """Return the token ids of a walk: a room, then doors' colours or `wait`.

    Words that join (`from the`, `take`, `door`, `then`, commas) are passed over.

    Raises:
        InputError: a word is unknown, or the walk does not begin in a room.
    """
    words = [
        word
        for word in text.lower().replace(",", " ").replace(".", " ").split()
        if word not in JOINING
    ]
    for word in words:
        if word not in WORDS:
            near = get_close_matches(word, WORDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"doors are {', '.join(DOORS)}"
            raise InputError(f"walk has the word {word!r}, must have rooms and doors: {hint}")
    if not words or words[0] not in ROOMS:
        first = words[0] if words else ""
        raise InputError(f"walk begins with {first!r}, must begin in a room: {', '.join(ROOMS)}")
    for word in words[1:]:
        if word in ROOMS:
            raise InputError(f"walk names the room {word!r} on its way, must name doors only")
    return np.array([[WORDS.index(word) for word in words]], dtype=np.int64)


def write_walk(token_ids: Sequence[int]) -> str:
    """Return a walk in words, as `read_walk` reads it."""
    return " ".join(WORDS[token_id] for token_id in token_ids)
