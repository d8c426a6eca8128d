"""Write with a model, turn by turn.

Examples:
    openmythos chat runs/nano
    openmythos chat runs/nano --loops 16 --halting gate --temperature 0.6
    openmythos chat runs/nano --seed 1 < lines.txt

The model knows text, not roles: it goes on with all that stands so far, yours and its own. An
empty line lets it go on by itself. Where the text outgrows the model's max_length, its beginning
is forgotten. Ctrl-C ends a reply, Ctrl-D leaves; /help lists the commands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import tyro

from openmythos.cli.loading import Loading
from openmythos.cli.loop_colours import LoopColours, colours_wanted
from openmythos.errors import InputError, MythosError
from openmythos.inference.chat import with_line
from openmythos.inference.sampling import Sampling
from openmythos.inference.shipped import LANGUAGE_MODEL, existing
from openmythos.inference.thinking import Thinking

if TYPE_CHECKING:
    from openmythos.config import HaltingKind
    from openmythos.inference.language_model import LanguageModel

HELP = """\
/loops N                    think at most N loops a token
/halting RULE [THRESHOLD]   none, gate, delta, kl or act
/temperature X              0 takes the likeliest token
/seed N                     make the next replies repeatable
/reset                      forget the text so far
/help                       this list
/quit                       leave, as Ctrl-D does
An empty line lets the model go on. To begin a line with a slash, write two."""

ENDED_AT_ONCE = "openmythos: the model ended the text at once: write more, or try another /seed"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of `openmythos chat`."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = Path(
        LANGUAGE_MODEL
    )
    """Folder of a model or of a training run, or the name of a model in the package."""

    loading: Annotated[Loading, tyro.conf.arg(name="")] = field(default_factory=Loading)
    """Where the model runs, and what its weights are there."""

    max_new_tokens: int = 64
    """Most tokens of a reply; at most half of the model's max_length."""

    thinking: Annotated[Thinking, tyro.conf.arg(name="")] = field(default_factory=Thinking)
    """How deep each token is thought about."""

    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    """How each token is drawn."""

    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends a reply and is left out of it; may be given several times."""

    show_loops: bool = False
    """Colour each token by the loops it took."""


def run(settings: Settings) -> None:
    """Read lines and answer them until the input ends."""
    existing(settings.model)  # before torch is loaded
    chat = Chat(settings.loading.load(settings.model), settings)
    asks = sys.stdin.isatty()
    if asks:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing and history)
        print("Your text, or /help. Ctrl-D leaves.")
    while not chat.ended:
        try:
            chat.take(_line("> " if asks else ""))
        except EOFError:
            break
        except KeyboardInterrupt:  # clears the line, as in a shell
            print()
        except MythosError as error:
            if not asks:
                raise
            print(f"openmythos: {error}", file=sys.stderr)
    if asks and not chat.ended:
        print()


def _line(prompt: str) -> str:
    try:
        return input(prompt)
    except UnicodeDecodeError:
        raise InputError(
            f"standard input must be {sys.stdin.encoding.upper()}, and is not: convert it, for "
            "example with iconv"
        ) from None


class Chat:
    """The text so far and how to go on with it."""

    def __init__(self, lm: LanguageModel, settings: Settings) -> None:
        self.lm, self.settings = lm, settings
        self.thinking, self.sampling = settings.thinking, settings.sampling
        self.text, self.ended = "", False
        self.replies = 0

    def take(self, line: str) -> None:
        """Do what a line says, or go on with the text after it."""
        if line.startswith("/") and not line.startswith("//"):
            self._command(*line[1:].split())
            return
        line = line.removeprefix("/") if line.startswith("//") else line
        before = self.text
        self.text = with_line(before, line)
        try:
            self._reply()
        except MythosError:  # a line that cannot be read would be refused again at every turn
            self.text = before
            raise

    def _reply(self) -> None:
        """Write until the reply ends or Ctrl-C ends it; what was written stands."""
        room = self._room()
        budget = self.thinking.loops_of(self.lm.model.config)
        colours = LoopColours(budget, self.settings.show_loops and colours_wanted())
        try:
            text = self._recent(room)
            stop = self.settings.stop
            for piece in self.lm.write(text, room, self.thinking, self._drawing(), stop):
                self.text += piece.text
                sys.stdout.write(colours.paint(piece))
                sys.stdout.flush()
            ended_at_once = not colours.counts
        except KeyboardInterrupt:
            ended_at_once = False
        print()
        self.replies += 1
        if ended_at_once:
            print(ENDED_AT_ONCE, file=sys.stderr)

    def _drawing(self) -> Sampling:
        """The sampling of the next reply: with a seed, each reply has draws of its own."""
        seed = self.sampling.seed
        if seed is None:
            return self.sampling
        return dataclasses.replace(self.sampling, seed=seed + self.replies)

    def _room(self) -> int:
        """Tokens that a reply may have: the text before it keeps half of max_length."""
        return min(self.settings.max_new_tokens, max(1, self.lm.model.config.max_length // 2))

    def _recent(self, room: int) -> str:
        """The text so far; where it leaves no room for the reply, the last part that does.

        Cut to three quarters, so that not every turn cuts, and measured again, because a part
        may have other tokens than it had in the whole.
        """
        most = max(1, self.lm.model.config.max_length - room - 1)  # the end mark stands before
        while len(token_ids := self.lm.tokenizer.encode(self.text)) > most:
            kept = self.lm.tokenizer.decode_bytes(token_ids[-max(1, 3 * most // 4) :])
            self.text = kept.decode("utf-8", "ignore")  # a character may have been cut
        return self.text

    def _command(self, name: str = "", *values: str) -> None:
        commands: dict[str, Callable[..., None]] = {
            "loops": self._loops,
            "halting": self._halting,
            "temperature": self._temperature,
            "seed": self._seed,
            "reset": self._reset,
            "help": self._help,
            "quit": self._quit,
        }
        if name not in commands:
            names = ", ".join(f"/{name}" for name in commands)
            raise InputError(f"command=/{name} must be one of {names}")
        try:
            inspect.signature(commands[name]).bind(*values)
        except TypeError:
            raise InputError(
                f"command=/{name} has {len(values)} values: see /help for how many it takes"
            ) from None
        commands[name](*values)

    def _loops(self, loops: str) -> None:
        if not loops.isdecimal() or int(loops) < 1:
            raise InputError(f"loops={loops} must be an integer of 1 or more")
        self.thinking = dataclasses.replace(self.thinking, loops=int(loops))

    def _halting(self, rule: str, threshold: str | None = None) -> None:
        bound = None if threshold is None else _number("threshold", threshold)
        self.lm.model.rule(rule, bound)  # it checks both
        kind = cast("HaltingKind", rule)
        self.thinking = dataclasses.replace(self.thinking, halting=kind, threshold=bound)

    def _temperature(self, temperature: str) -> None:
        value = _number("temperature", temperature)
        self.sampling = dataclasses.replace(self.sampling, temperature=value)

    def _seed(self, seed: str) -> None:
        if not seed.isdecimal():
            raise InputError(f"seed={seed} must be an integer of 0 or more")
        self.sampling = dataclasses.replace(self.sampling, seed=int(seed))
        self.replies = 0

    def _reset(self) -> None:
        self.text, self.replies = "", 0

    def _help(self) -> None:
        print(HELP)

    def _quit(self) -> None:
        self.ended = True


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InputError(f"{name}={value} must be a number") from None
