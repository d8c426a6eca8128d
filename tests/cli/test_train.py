"""The command that trains: what it says besides the bar, what it takes anew, who reads it."""

import os
import subprocess
import sys

import pytest
from command_line import SHAPE, TRAINING, printed

from openmythos.cli import main
from openmythos.training.metrics import metrics
from openmythos.training.run import OfMachine, finished, gate_trained


def flags(vocab_size=SHAPE["vocab_size"], **other):
    shape, training = SHAPE | {"vocab_size": vocab_size}, TRAINING | other
    named = {f"model.{name}": value for name, value in shape.items()} | training
    return [f"--{name.replace('_', '-')}={value}" for name, value in named.items()]


@pytest.mark.parametrize("wanted", [280, 5000])
def test_a_smaller_vocabulary_than_asked_for_is_told(text, tmp_path, wanted):
    given = flags(vocab_size=wanted)
    page = printed("train", "--text", text, "--run", tmp_path / "run", *given)
    assert ("in place of 5000: the text repeats too little for more tokens" in page) == (
        wanted == 5000
    )
    assert ("vocab_size=" in page) == (wanted == 5000)


def test_a_tokenizer_that_is_given_has_a_vocabulary_of_its_own(run, text, tmp_path):
    given = run / "tokenizer.json"
    more = ["--tokenizer", given, *flags(vocab_size=999)]
    page = printed("train", "--text", text, "--run", tmp_path / "run", *more)
    assert f"in place of 999: {given} has as many" in page


def test_a_run_may_be_given_anew_that_it_recomputes_nothing(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        "openmythos.training.start.open_run", lambda *run, **how: given.append(how) or 1 / 0
    )
    anew = ["--no-checkpoint-activations", "--precision=fp32"]
    with pytest.raises(ZeroDivisionError):
        main(["train", "--resume", str(tmp_path), *anew])
    wanted = OfMachine(checkpoint_activations=False, precision="fp32")
    assert given == [{"steps": None, "of_machine": wanted}]


def test_a_finished_run_finishes_again_with_what_is_given_anew(text, tmp_path):
    run = tmp_path / "run"
    printed("train", "--text", text, "--run", run, *flags(gate_steps=0))
    assert not any("gate" in line for line in metrics(run))
    page = printed("train", "--resume", run, "--gate-steps", 2)
    assert "gate: threshold" in page
    assert gate_trained(run) is True
    assert "is finished already" in printed("train", "--resume", run, "--save-every", 7)


@pytest.mark.parametrize("reader", ["pipe", "terminal"])
def test_a_training_goes_on_where_nobody_reads_it_any_more(text, tmp_path, reader):
    pty, run = pytest.importorskip("pty"), tmp_path / "run"
    read, write = os.pipe() if reader == "pipe" else pty.openpty()
    command = [sys.executable, "-m", "openmythos", "train", "--text", text, "--run", run, *flags()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=write, stderr=subprocess.PIPE, env=environment
    ) as process:
        os.close(write)
        assert b"parameters" in os.read(read, 1000)
        os.close(read)
        said = process.stderr.read()
    assert (process.returncode, said) == (0, b"")
    assert finished(run)
