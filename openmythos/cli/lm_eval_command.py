"""Score a model with EleutherAI's lm-evaluation-harness, which must be installed.

Examples:
    openmythos lm-eval --model openmythos --model_args pretrained=runs/nano,loops=8 --tasks sciq
    openmythos lm-eval run --help
    openmythos lm-eval ls tasks

All arguments go to the harness's own command line, which knows our models as `openmythos`. Of
--model_args, pretrained is the folder of a model or of a run; loops, halting and threshold say
how deep each token is thought about. Models are asked in plain text, so --apply_chat_template is
refused. The harness fetches its tasks' questions from the network; with --include_path it reads
tasks of yours, whose questions may lie in a local file.

It brings some 350 MB of packages, and is best installed in an environment of its own, torch first
and in the build that you want, or another one is fetched with it. In the checkout of this project,
which is the `.` below:

    python -m venv eval && eval/bin/pip install torch==2.13.0
    eval/bin/pip install . lm-eval==0.4.13
    eval/bin/openmythos lm-eval ...
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from openmythos.errors import InputError

PACKAGE = "lm_eval"
HANDS_ON = True


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of `openmythos lm-eval`."""

    arguments: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[ARGS]")
    ] = ()
    """Handed on as they are."""


def run(settings: Settings) -> None:
    """Register our models, then let the harness run."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise InputError(
            "lm-eval must be installed, best in an environment of its own: pip install "
            "lm-eval==0.4.13 (openmythos lm-eval --help says how)"
        )
    from lm_eval.__main__ import cli_evaluate

    import openmythos.inference.harness  # noqa: F401 - registers them

    before, sys.argv = sys.argv, ["lm-eval", *settings.arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
