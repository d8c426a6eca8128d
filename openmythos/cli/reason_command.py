"""Walk through a house of 32 rooms, and watch the model find its way loop by loop.

Examples:
    openmythos reason library red green gold
    openmythos reason --hops 40                     # deeper than any walk in its training
    openmythos reason --hops 40 --loops 12          # too few loops: it fails
    openmythos reason --hops 12 --halting gate      # each place stops when it is sure

A walk names a room, then doors by colour, or `wait`. Every room has a door of each colour, which
leads to a room, here and there to the same one; the model knows all 512 doors by heart and has to
follow them one after another. A line shows what it believes after a loop, one mark per word of the
walk: ● right, ○ not yet. With --halting, ■ and □ are places that have stopped thinking, right or
wrong. Where the terminal has no such marks, they are # and . and, stopped, = and -.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from openmythos.cli.flags import refuse_unused, typed
from openmythos.cli.loop_colours import colours_wanted, writable
from openmythos.config import HaltingKind
from openmythos.errors import InputError
from openmythos.inference.shipped import REASONER, find_model
from openmythos.inference.thinking import Thinking
from openmythos.training.run import SETTINGS, TOKENIZER

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int64

    from openmythos.inference.reasoner import Trace

MARKS, PLAIN_MARKS = "●○■□", "#.=-"
"""A place that is right or not yet; one that has stopped, right or wrong."""
GREEN, GREY, BOLD, RESET = "\x1b[38;5;41m", "\x1b[38;5;244m", "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of `openmythos reason`."""

    walk: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[WALK ...]")] = ()
    """A room and doors, as in `library red green gold`. Default: a random walk of --hops."""

    hops: int | None = None
    """Doors of a random walk. Default: 40, twice as many as in training."""

    waits: int = 0
    """Waits strewn over a random walk."""

    seed: int = 0
    """Of the random walk."""

    loops: int | None = None
    """Most loops. Default: one for each door, a quarter more for each word, and eight, which is
    enough among up to 70 waits. Among 100 one walk in eight is lost with any number of loops, and
    among 150 nearly every one."""

    halting: HaltingKind = "none"
    """When a place stops before: never, by the learned gate, or by another rule."""

    threshold: float | None = None
    """The rule's bound. Default: its own."""

    model: Path = Path(REASONER)
    """Folder of a model that was trained on walks. Default: the one in the package."""

    json: bool = False
    """Print one JSON object instead."""

    typed: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Names of the flags that were typed, whatever their values."""


def defaults(arguments: Sequence[str]) -> Settings:
    """Settings that know which flags were typed."""
    return Settings(typed=typed(arguments))


def run(settings: Settings) -> None:
    """Solve a walk and show how."""
    token_ids, model = _walk(settings), _checked(settings.model)  # both said before torch is loaded
    from openmythos.inference.reasoner import load_reasoner

    reasoner = load_reasoner(model)
    thinking = Thinking(
        loops=settings.loops, halting=settings.halting, threshold=settings.threshold
    )
    trace = reasoner.solve(token_ids, thinking)
    if settings.json:
        print(json.dumps(as_json(trace)))
        return
    for line in lines(trace, colours=colours_wanted()):
        print(line)


def _walk(settings: Settings) -> Int64[np.ndarray, "1 sequence"]:
    """Return the token ids of the walk that is given or drawn.

    Raises:
        InputError: both, or it is no walk.
    """
    import numpy as np

    from openmythos.tasks.rooms import HOUSE, read_walk

    if settings.walk:
        if settings.hops is not None or settings.waits:
            raise InputError(
                "walk must be given or drawn: leave out --hops and --waits, or the walk"
            )
        refuse_unused(settings.typed, ("seed",), "with a walk: it draws one")
        return read_walk(" ".join(settings.walk))
    hops = 40 if settings.hops is None else settings.hops
    for name, value in (("hops", hops), ("waits", settings.waits), ("seed", settings.seed)):
        if value < 0:
            raise InputError(f"{name}={value} must be 0 or more")
    random = np.random.default_rng(settings.seed)
    return HOUSE.chains(random, 1, hops, hops + settings.waits).token_ids


def _checked(model: Path) -> Path:
    """Return a model that may be a reasoner; a run of `openmythos train` reads text, and is none.

    Raises:
        InputError: the folder is a run, or of a model with a tokenizer.
    """
    folder = find_model(model)
    if (folder / SETTINGS).is_file() or (folder / TOKENIZER).is_file():
        raise InputError(
            f"model={str(model)!r} must be a reasoner, which was trained on walks, and is one that "
            "reads text: leave out --model, or use openmythos generate"
        )
    return model


def lines(trace: Trace, *, colours: bool) -> list[str]:
    """Return what is shown: the walk, a line for each loop, and how it ended."""
    from openmythos.tasks.rooms import WORDS, write_walk

    def painted(text: str, colour: str) -> str:
        return f"{colour}{text}{RESET}" if colours else text

    ids = [int(token_id) for token_id in trace.chain.token_ids[0]]
    hops = int(trace.chain.hops[0, -1])
    shown = [painted(f"{hops} door{'s' * (hops != 1)}: ", BOLD) + write_walk(ids), ""]
    width, all_marks = len(str(len(trace.beliefs))), writable(MARKS, PLAIN_MARKS)
    for loop, (beliefs, right) in enumerate(zip(trace.beliefs, trace.right, strict=True)):
        marks = ""
        for place, good in enumerate(right):
            done = trace.halting != "none" and trace.stopped[place] <= loop + 1
            marks += painted(all_marks[2 * done + (not good)], GREEN if good else GREY)
        here = WORDS[int(beliefs[-1])]
        ending = painted(here, BOLD + GREEN if right[-1] else GREY)
        shown.append(f"loop {loop + 1:>{width}}  {marks}  {ending}")
    shown += ["", _verdict(trace)]
    return shown


def _verdict(trace: Trace) -> str:
    from openmythos.tasks.rooms import ROOMS

    truth, given = ROOMS[int(trace.chain.answers[0, -1])], ROOMS[trace.answer]
    detail = f"{len(trace.beliefs)} loops"
    if trace.halting != "none":
        last, mean = int(trace.stopped[-1]), trace.stopped.mean()
        detail += f"; the last place stopped after {last}, a place on average after {mean:.1f}"
    if trace.solved:
        return f"The walk ends in the {truth}: right. ({detail})"
    return f"The model says {given}, but the walk ends in the {truth}: wrong. ({detail})"


def as_json(trace: Trace) -> dict[str, Any]:
    """Return the trace in plain values."""
    from openmythos.tasks.rooms import WORDS

    words = [WORDS[int(token_id)] for token_id in trace.chain.token_ids[0]]
    return {
        "walk": words,
        "truth": [WORDS[int(room)] for room in trace.chain.answers[0]],
        "beliefs": [[WORDS[int(room)] for room in row] for row in trace.beliefs],
        "stopped": [int(loops) for loops in trace.stopped],
        "answer": WORDS[trace.answer],
        "solved": trace.solved,
    }
