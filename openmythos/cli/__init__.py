"""The command `openmythos`: one file per command, found by name; torch is imported inside.

A command's file has a docstring (its help), a settings dataclass `Settings` (its flags) and a
function `run(settings)`; with `HANDS_ON = True` its settings are `arguments`, as they were typed.
An error of ours becomes one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from importlib import import_module
from typing import Any

from openmythos.cli.process import discard_stdout, open_closed_streams, prepare
from openmythos.errors import ConfigError, MythosError

COMMANDS = {
    "demo": "See the shipped models write and reason, then train one on real text.",
    "train": "Train a model on your text.",
    "generate": "Continue a prompt.",
    "chat": "Write with a model, turn by turn.",
    "reason": "Walk through a house of rooms, and watch the model find its way loop by loop.",
    "serve": "Serve a model over HTTP, as OpenAI's API does.",
    "eval": "Measure a text's bits per byte, or published tasks, at several depths.",
    "lm-eval": "Score a model with EleutherAI's lm-evaluation-harness.",
    "export": "Write a model with smaller weights, and measure what that costs.",
    "info": "Show a scale's parameters, operations and memory, or compare all.",
    "plot": "Draw a training run.",
    "evidence": "Reproduce a claim: its trainings, its controls, its figures.",
    "bench": "Measure this machine and a model's speed on it.",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, 2 on bad input, 130 on Ctrl-C."""
    try:
        open_closed_streams()
        prepare()
        arguments = sys.argv[1:] if arguments is None else arguments
        try:
            _run(arguments)
        finally:
            sys.stdout.flush()  # here, because the interpreter's own fails with a traceback
    except MythosError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader has seen enough, as with `| head`
        discard_stdout()
        sys.exit(0)
    except OSError as error:  # a path that the system refuses, or a full disk behind stdout
        if error.filename is None:
            discard_stdout()
        where = "" if error.filename is None else f"{error.filename}: "
        _fail(f"{where}{error.strerror or error}")


def _run(arguments: list[str]) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # one that has no bar or no é prints a ? there
        sys.stdout.reconfigure(errors="replace")
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if arguments[0] == "--version":
        from openmythos import __version__

        print(f"openmythos {__version__}")
        return
    name = arguments[0]
    if name not in COMMANDS:
        from openmythos.cli.refusals import did_you_mean

        near = did_you_mean(name, [*COMMANDS, "--help", "--version"])
        raise ConfigError(f"command={name!r} must be one of {', '.join(COMMANDS)}{near}")
    command = command_of(name)
    warnings.showwarning = _warn
    command.run(parse(command, name, arguments[1:]))


def command_of(name: str) -> Any:
    """Import a command's file, which has `_` where the name has `-`."""
    return import_module(f"openmythos.cli.{name.replace('-', '_')}_command")


def parse(command: Any, name: str, arguments: list[str]) -> Any:
    """Build a command's `Settings` from its flags.

    Raises:
        ConfigError: a flag does not exist, or its value does not fit.
    """
    import tyro

    from openmythos.cli.flag_help import DESCRIPTION, fill_help, printed_page
    from openmythos.cli.flags import no_empty_paths, refuse_repeats
    from openmythos.cli.refusals import in_one_sentence

    fill_help(command.Settings)

    if getattr(command, "HANDS_ON", False) and arguments[:1] not in ([], ["-h"], ["--help"]):
        arguments = ["--", *arguments]  # flags of another program, which are not ours to read
    else:
        refuse_repeats(command.Settings, arguments)
    defaults = command.defaults(arguments) if hasattr(command, "defaults") else None
    extra = {} if defaults is None else {"default": defaults}
    with printed_page(command.__doc__):
        return in_one_sentence(
            name,
            command.Settings,
            arguments,
            lambda: tyro.cli(
                command.Settings,
                prog=f"openmythos {name}",
                description=DESCRIPTION,
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),  # --json, without a --no-json
                registry=no_empty_paths(),
                **extra,
            ),
        )


def _overview() -> str:
    rows = "\n".join(f"  {name:<10}{line}" for name, line in COMMANDS.items())
    return (
        "Recurrent-depth transformers: train them, run them, choose how deep they think.\n\n"
        f"usage: openmythos COMMAND [flags]\n\n{rows}\n\n"
        "openmythos COMMAND --help shows a command's flags and an example.\n"
        "First steps: openmythos demo"
    )


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"openmythos: {message}", file=sys.stderr)


def _fail(sentence: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"openmythos: {sentence}", file=sys.stderr)
    sys.exit(2)
