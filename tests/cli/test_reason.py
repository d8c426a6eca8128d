"""`openmythos reason` shows a walk, loop by loop."""

import io
import json

import pytest
from command_line import openmythos
from tiny import tiny

from openmythos.cli import main
from openmythos.tasks.rooms import HOUSE, WORDS, read_walk


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reasoner")
    tiny(vocab_size=HOUSE.vocab_size, experts=0).save_pretrained(folder)
    return folder


def test_a_given_walk_is_shown_with_a_line_for_each_loop(model):
    out = openmythos("reason", "library red wait gold", "--loops", 4, "--model", model).out
    words = ("library", "red", "wait", "gold")
    assert openmythos("reason", *words, "--loops", 4, "--model", model).out == out
    lines = out.splitlines()
    assert lines[0] == "2 doors: library red wait gold"
    shown = [line for line in lines if line.startswith("loop ")]
    assert len(shown) == 4
    marks = [line.split()[2] for line in shown]
    assert all(len(mark) == 4 for mark in marks)  # a mark for each word
    assert set("".join(marks)) <= set("●○")
    assert "The walk ends in the" in out or "but the walk ends in the" in out


def test_places_that_have_stopped_are_marked(model):
    flags = ["--loops", 6, "--halting", "delta", "--threshold", 0.9, "--model", model]
    out = openmythos("reason", "library red gold", *flags).out
    marks = [line.split()[2] for line in out.splitlines() if line.startswith("loop ")]
    assert set(marks[-1]) <= set("■□")
    assert "a place on average after" in out


@pytest.mark.parametrize(
    ("encoding", "going", "stopped"),
    [("utf-8", "●○", "■□"), ("ascii", "#.", "=-"), ("latin-1", "#.", "=-")],
)
def test_marks_are_those_that_the_terminal_can_write(encoding, going, stopped, model, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", shown)
    flags = ["--loops", "6", "--halting", "delta", "--threshold", "0.9", "--model", str(model)]
    main(["reason", "library", "red", "gold", *flags])
    shown.flush()
    lines = shown.buffer.getvalue().decode(encoding).splitlines()
    marks = [line.split()[2] for line in lines if line.startswith("loop ")]
    assert set(marks[0]) <= set(going)
    assert set(marks[-1]) <= set(stopped)


def test_json_has_the_truth_of_a_drawn_walk(model):
    out = openmythos("reason", "--hops", 5, "--waits", 2, "--json", "--model", model).out
    trace = json.loads(out)
    assert len(trace["walk"]) == 8
    assert trace["walk"].count("wait") == 2
    truth = HOUSE.follow(read_walk(" ".join(trace["walk"]))).answers[0]
    assert [WORDS[room] for room in truth] == trace["truth"]
    assert trace["solved"] == (trace["answer"] == trace["truth"][-1])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["library rad"], "did you mean 'red'?"),
        (["library red", "--hops", "3"], "walk must be given or drawn"),
        (["--hops", "-1"], "hops=-1 must be 0 or more"),
        (["--waits", "-1"], "waits=-1 must be 0 or more"),
        (["--loops", "0"], "loops=0"),
    ],
)
def test_bad_input_is_refused_with_one_sentence(model, flags, sentence):
    result = openmythos("reason", *flags, "--model", model)
    assert result.code == 2
    assert sentence in result.err
    assert len(result.err.splitlines()) == 1
