"""The command line in this process: what it prints, and its exit code."""

import contextlib
import io
import json
from types import SimpleNamespace

import pytest

from openmythos.cli import main

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 16,
    "max_length": 64,
    "num_heads": 2,
    "kv_heads": 1,
    "core_layers": 1,
    "mean_loops": 2,
    "experts": 3,
    "expert_size": 8,
}
TRAINING = {
    "steps": 3,
    "batch_size": 2,
    "length": 16,
    "gate_steps": 2,
    "evaluate_every": 2,
    "precision": "fp32",
}
RHYME = "\n\n".join(f"The {n} mice ran up the clock, and the clock struck {n}." for n in range(90))


def openmythos(*arguments, stdin=""):
    """Run a command; return its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    typed = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
    code = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr("sys.stdin", typed)
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code or 0
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def printed(*arguments, stdin=""):
    """Run a command that must succeed; return what it printed."""
    result = openmythos(*arguments, stdin=stdin)
    assert result.code == 0, result.err
    return result.out


def answer(*arguments):
    """Run a command with --json; return its answer."""
    return json.loads(printed(*arguments, "--json"))
