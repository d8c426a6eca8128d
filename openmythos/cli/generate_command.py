"""Continue a prompt, at the depth you choose.

Examples:
    openmythos generate --prompt 'Fellow citizens'
    openmythos generate runs/nano --prompt 'The whale' --loops 8
    openmythos generate runs/nano --prompt 'The whale' --loops 16 --halting gate --show-loops
    cat story.txt | openmythos generate runs/nano --prompt - --temperature 0 --json

MODEL is the folder of a model or of a training run; without one it is the package's own. Text
appears as it is made. It ends at the end of a document, at a --stop string, after
--max-new-tokens, or where the model's max_length is reached.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from openmythos.cli.loading import Loading
from openmythos.cli.loop_colours import LoopColours, colours_wanted
from openmythos.errors import CheckpointError, InputError
from openmythos.inference.sampling import Sampling
from openmythos.inference.shipped import LANGUAGE_MODEL, existing, find_model
from openmythos.inference.thinking import Thinking

if TYPE_CHECKING:
    from collections.abc import Generator

    from openmythos.inference.language_model import Ending, Piece


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of `openmythos generate`."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = Path(
        LANGUAGE_MODEL
    )
    """Folder of a model or of a training run, or the name of a model in the package."""

    loading: Annotated[Loading, tyro.conf.arg(name="")] = field(default_factory=Loading)
    """Where the model runs, and what its weights are there."""

    prompt: str = ""
    """Text to continue; `-` reads it from standard input, less a last line break. Default: start a
    document."""

    max_new_tokens: int = 256
    """Most tokens to make."""

    thinking: Annotated[Thinking, tyro.conf.arg(name="")] = field(default_factory=Thinking)
    """How deep each token is thought about."""

    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    """How each token is drawn."""

    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends the text and is left out of it; may be given several times."""

    show_loops: bool = False
    """Colour each token by the loops it took, and count them at the end. JSON has them anyway."""

    json: bool = False
    """Print one JSON object at the end instead of text."""


def run(settings: Settings) -> None:
    """Load the model and write."""
    if settings.show_loops and settings.json:
        raise InputError("show_loops must be left out with --json, which has every token's loops")
    _check_there(settings)
    prompt = _from_stdin() if settings.prompt == "-" else settings.prompt
    lm = settings.loading.load(settings.model)
    pieces = lm.write(
        prompt, settings.max_new_tokens, settings.thinking, settings.sampling, settings.stop
    )
    if settings.json:
        print(json.dumps(_as_json(pieces, len(lm.prompt_ids(prompt)))))
        return
    wanted = settings.show_loops and colours_wanted()
    budget = settings.thinking.loops_of(lm.model.config)
    colours = LoopColours(budget, wanted)
    started, interrupted = time.perf_counter(), None
    try:
        for piece in pieces:
            sys.stdout.write(colours.paint(piece))
            sys.stdout.flush()
    except KeyboardInterrupt as error:  # what was written is ended as any text is
        interrupted = error
    seconds = time.perf_counter() - started
    print()
    if not colours.counts and interrupted is None:
        print(_ended_at_once(settings.sampling), file=sys.stderr)
    if settings.show_loops:
        print(f"\n{colours.legend()}")
    if sys.stderr.isatty():
        tokens = colours.counts.total()
        print(f"[{tokens} tokens, {tokens / seconds:.0f} a second]", file=sys.stderr)
    if interrupted is not None:
        raise interrupted


def _check_there(settings: Settings) -> None:
    """Refuse a model that is not there, before torch is loaded."""
    try:
        existing(settings.model)
    except CheckpointError as error:
        if settings.prompt or find_model(settings.model).exists():
            raise
        raise CheckpointError(f"{error}; a text to continue is given with --prompt") from None


def _ended_at_once(sampling: Sampling) -> str:
    other = " or another --seed" if sampling.temperature else ""  # which then changes nothing
    return f"openmythos: the model ended the text at once: try a longer prompt{other}"


def _as_json(pieces: Generator[Piece, None, Ending], prompt_tokens: int) -> dict[str, Any]:
    """Take all pieces; the clock runs from the prompt's first token to the last new one.

    The mark that starts a document is one of the prompt's tokens.
    """
    started = time.perf_counter()
    made, ending = _all_of(pieces)
    seconds = time.perf_counter() - started
    tokens = [piece for piece in made if piece.token_id is not None]
    loops = [piece.loops for piece in tokens]
    return {
        "text": "".join(piece.text for piece in made),
        "token_ids": [piece.token_id for piece in tokens],
        "loops": loops,
        "mean_loops": sum(loops) / len(loops) if loops else None,
        "finish": ending,
        "prompt_tokens": prompt_tokens,
        "seconds": seconds,
        "tokens_per_second": len(tokens) / seconds,
    }


def _all_of(pieces: Generator[Piece, None, Ending]) -> tuple[list[Piece], Ending]:
    """Return all pieces, and why no more came."""
    made: list[Piece] = []
    while True:
        try:
            made.append(next(pieces))
        except StopIteration as end:
            return made, end.value


def _from_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"prompt from standard input must be UTF-8, but is not at byte {error.start}: "
            "convert it, for example with iconv"
        ) from None
