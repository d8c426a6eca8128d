"""A run's folder: what it remembers, and where in it a model lies."""

import dataclasses
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import SIZES, tiny

from openmythos import MythosConfig, Tokenizer
from openmythos.errors import CheckpointError, ConfigError
from openmythos.training import checkpoint
from openmythos.training.run import (
    MODEL,
    SETTINGS,
    TRAINED,
    Settings,
    config_in,
    gate_trained,
    keep_trained_length,
    model_in,
    run_of,
    trained_length,
)
from openmythos.training.run_lock import RunLock
from openmythos.training.settings import Source, TrainConfig
from openmythos.training.start import open_run, start_run


@pytest.fixture
def run(tmp_path):
    """A finished run, without its text: settings, a checkpoint and a model."""
    settings = Settings(MythosConfig(**SIZES), TrainConfig(length=12), Source(corpus="embedded"))
    settings.save(tmp_path)
    checkpoint.save(tmp_path, 7, {"model": {}}, {})
    tokenizer = Tokenizer.train(["the cat sat on the mat"], vocab_size=260)
    tiny().save_pretrained(tmp_path / MODEL, tokenizer)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        (Source(corpus="sotu"), {"corpus": "sotu"}),
        (
            Source(text=Path("/books"), field="body", held_out=0.1),
            {"text": "/books", "field": "body", "held_out": 0.1},
        ),
    ],
)
def test_a_source_is_kept_with_what_it_needs_and_no_more(tmp_path, source, kept):
    settings = Settings(MythosConfig(**SIZES), TrainConfig(), source)
    settings.save(tmp_path)
    assert json.loads((tmp_path / SETTINGS).read_text())["source"] == kept
    assert Settings.load(tmp_path) == settings


@pytest.mark.parametrize("kept", [{}, {"text": "/books"}, "embedded", 5, {"corpus": None}])
def test_a_source_that_is_not_whole_is_refused(run, kept):
    content = json.loads((run / SETTINGS).read_text())
    (run / SETTINGS).write_text(json.dumps({**content, "source": kept}))
    with pytest.raises(CheckpointError, match="must be a whole settings file, but"):
        Settings.load(run)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "one of corpus and text must be given, and not both"),
        ({"corpus": "sotu", "text": Path("a")}, "one of corpus and text must be given, and not"),
        ({"corpus": "sotu", "held_out": 0.1}, "held_out=0.1 must go with text: a corpus with a"),
        ({"corpus": "sotu", "field": "body"}, "field='body' must go with text: a corpus with a"),
    ],
)
def test_a_source_is_a_corpus_or_a_text(given, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Source(**given)


def test_the_model_in_a_run_is_the_finished_one(run):
    assert model_in(run) == model_in(run / MODEL) == run / MODEL
    (step,) = run.glob("step-*")
    assert model_in(step) == step
    assert run_of(step) == run_of(run) == run
    (run / MODEL / "tokenizer.json").unlink()  # as a training that goes on leaves it
    assert model_in(run) == run
    assert run_of(run / "nowhere") == run / "nowhere"


def test_the_config_is_found_in_a_model_a_run_and_a_checkpoint(run):
    (step,) = run.glob("step-*")
    for folder in (run, run / MODEL, step):
        assert config_in(folder) == MythosConfig(**SIZES)
    (run / MODEL / "tokenizer.json").unlink()
    assert config_in(run) == MythosConfig(**SIZES)
    (run / SETTINGS).unlink()
    for folder in (step, run / "nowhere"):
        with pytest.raises(CheckpointError, match=r"config\.json must exist"):
            config_in(folder)


def test_the_length_of_a_training_is_known_in_all_that_it_wrote(run):
    (step,) = run.glob("step-*")
    assert [trained_length(folder) for folder in (run, run / MODEL, step)] == [12, 12, 12]


@pytest.mark.parametrize("content", ['{"length": 0}', "{}", "[16]", "{", '{"length": "16"}'])
def test_a_damaged_note_of_the_training_is_refused(tmp_path, content):
    (tmp_path / TRAINED).write_text(content)
    with pytest.raises(CheckpointError, match=r"training\.json .*[mM]end or delete it"):
        trained_length(tmp_path)


def test_whether_a_gate_was_trained_is_kept_beside_the_model(tmp_path):
    model = tmp_path / "model"
    for gate in (True, False, None):
        keep_trained_length(model, 12, gate=gate)
        assert gate_trained(model) is gate_trained(tmp_path) is gate
        assert trained_length(model) == 12
    (model / TRAINED).write_text('{"length": 12, "gate": "yes"}')
    with pytest.raises(CheckpointError, match="has gate='yes', must have true or false"):
        gate_trained(model)


def test_a_checkpoint_has_an_untrained_gate_unless_it_started_from_a_model(run):
    (step,) = run.glob("step-*")
    assert gate_trained(step) is False
    (run / MODEL / TRAINED).unlink(missing_ok=True)
    assert gate_trained(run) is gate_trained(run / MODEL) is None  # from before it was kept
    settings = Settings.load(run)
    dataclasses.replace(settings, start_from="another").save(run)
    assert gate_trained(step) is None
    assert gate_trained(run / "nowhere") is None


def test_a_folder_that_says_nothing_of_its_training_has_no_length(tmp_path):
    assert trained_length(tmp_path) is None
    assert trained_length(tmp_path / "nowhere") is None
    keep_trained_length(tmp_path / "model", 12)
    assert trained_length(tmp_path / "model") == 12


HOLDER = """
import os, sys
from pathlib import Path
from openmythos.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
if child := os.fork():
    os.waitpid(child, 0)
else:  # as a process that computes for this one, whose end is not the lock's
    lock.release()
    os._exit(0)
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def held(run):
    """Have another process that trains a run; yield its number."""
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process.pid


needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")


@needs_locks
def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    with held(tmp_path) as pid, pytest.raises(CheckpointError, match=f"process {pid} is at it"):
        RunLock(tmp_path).take()
    RunLock(tmp_path).take()


@needs_locks
def test_what_would_change_a_run_that_another_process_trains_is_refused_before(tmp_path):
    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {n} mice ran up the clock." for n in range(90)))
    shape = MythosConfig(**{**SIZES, "vocab_size": 300})
    given = (run, shape, TrainConfig(steps=1, batch_size=2, length=8))
    run.mkdir()
    with held(run), pytest.raises(CheckpointError, match="by one process at a time"):
        start_run(*given, source=Source(text=text))
    start_run(*given, source=Source(text=text))
    (run / ".openmythos-unfinished-step-00000001").mkdir()  # as the other process has it
    before = sorted(run.iterdir())
    with held(run), pytest.raises(CheckpointError, match="by one process at a time"):
        open_run(run)
    assert sorted(run.iterdir()) == before
    open_run(run)
    assert len(list(run.iterdir())) == len(before) - 1


@needs_locks
def test_a_lock_is_let_go_with_its_last_name_and_taken_twice_by_one_process(tmp_path):
    lock = RunLock(tmp_path)
    for _ in range(2):
        lock.take()
    RunLock(tmp_path).take()
    del lock
    with held(tmp_path):
        pass


def test_where_there_are_no_locks_a_run_is_trained_without(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()
    assert not list(tmp_path.iterdir())
