"""Flags that do not fit: one sentence with the field, the value and what would be right."""

import re
from dataclasses import fields

import pytest
from command_line import openmythos

from openmythos import load
from openmythos.cli import COMMANDS, command_of
from openmythos.cli.flags import flags_of
from openmythos.cli.refusals import WITH_MODEL
from openmythos.errors import CheckpointError

SAID = {
    "generate x --loops 2.5": "loops='2.5' must be an integer: see openmythos generate --help",
    "generate x --temperature warm": "temperature='warm' must be a number: see openmythos",
    "generate x --halting sleep": "halting='sleep' must be one of none, gate, delta, kl, act",
    "train --corpus foo": "corpus='foo' must be one of ",
    "train --text x --model.kv-heads 3": "kv_heads=3 must divide num_heads=4: choose one of 1, 2",
    "train --text x --model.head-dim 7": "head_dim=7 must be even",
    "train --text x --model.experts-per-token 9": "experts_per_token=9 must be from 1 to experts=8",
    "train --text x --model.attention full": "model.attention='full' must be one of gqa, mla",
    "train --text x --model.hidden-size 32 --model.num-heads 3": "num_heads=3 must divide hidden",
    "plot": "run must be given: see openmythos plot --help",
    "train --steps": "--steps must be followed by a value: see openmythos train --help",
    "train --batch-size many": "batch_size='many' must be an integer: see openmythos train --help",
    "train --nosuch 3": "--nosuch is no flag of train, nor expected there: see openmythos train",
    "generate x y": "y is no flag of generate, nor expected there: see openmythos generate --help",
    "eval x --loops 1 b": "loops='1', 'b' must be an integer: see openmythos eval --help",
    "info --loops 1 16 1t": "loops='1', '16', '1t' must be an integer: give MODEL before --loops",
    "bench --loops 1 nano --json": "loops='1', 'nano' must be an integer: give MODEL before",
    "eval --corpus embedded --loops many": "loops='many' must be an integer: see openmythos eval",
    "eval x --loops it's": 'loops="it\'s" must be an integer: see openmythos eval --help',
    "info --loops many": "loops='many' must be an integer: see openmythos info --help",
    "train --text a --text b": "--text must be given once, and is given 2 times: it takes one file",
    "train --batch-size 2 --batch_size=4": "--batch-size must be given once, and is given 2 times",
    "train --model.qk-norm True --model.qk-norm False": "--model.qk-norm must be given once, and",
    "eval x --loops 1 --loops 2": "--loops must be given once, and is given 2 times: give all of",
    "train --text a b": "text='a', 'b' must be one file or folder: see openmythos train --help",
    "train --text=a b c": "text='a', 'b' must be one file or folder: see openmythos train --help",
    "train --steps 5 6": "steps='5', '6' must be one integer: see openmythos train --help",
    "generate --json a b": "b is no flag of generate, nor expected there: see openmythos generate",
    "train --txt a": "--txt is no flag of train, nor expected there: did you mean --text?",
    "train --mean-loop 3": "--mean-loop is no flag of train, nor expected there: did you mean --mo",
    "serve --prot 80": "--prot is no flag of serve, nor expected there: did you mean --port?",
}

EMPTY = {
    ("train", "--text", ""): "text=''",
    ("train", "--tokenizer="): "tokenizer=''",
    ("train", "--resume", ""): "resume=''",
    ("train", "--corpus", "embedded", "--run", ""): "run=''",
    ("plot", ""): "run=''",
    ("generate", "", "--prompt", "a"): "model=''",
    ("export", "openmythos-lm", ""): "folder=''",
    ("eval", "openmythos-lm", "--text", "x", "--given="): "given=''",
    ("evidence", "routing", "--work", ""): "work=''",
    ("reason", "--model", ""): "model=''",
    ("demo", "--run", ""): "run=''",
}


@pytest.mark.parametrize(("words", "said"), EMPTY.items(), ids=map(" ".join, EMPTY))
def test_an_empty_path_is_not_this_folder(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = openmythos(*words)
    assert result.err == f"openmythos: {said} must be a path: this folder is called .\n"
    assert result.code == 2
    assert not list(tmp_path.iterdir())


def test_an_empty_name_of_a_model_is_not_this_folder(run, monkeypatch):
    monkeypatch.chdir(run)
    for command in ("info", "bench"):
        assert openmythos(command, "").err.startswith("openmythos: model='' must be one of nano")
    with pytest.raises(CheckpointError, match="model='' must be the folder of a model"):
        load("")


def test_every_flag_of_a_help_page_is_known_with_what_it_takes(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    for name in COMMANDS:
        page = openmythos(name, "--help").out
        shown = dict(re.findall(r"  --([a-z][\w.-]*)(?: (\S.*?))?(?:  |$)", page, re.MULTILINE))
        flags = flags_of(command_of(name).Settings)
        assert flags.keys() == shown.keys() - {"help"}
        for flag, kind in flags.items():
            assert (kind.takes == "nothing") == (not shown[flag]), flag
            assert (kind.takes == "several") == ("..." in shown[flag]), flag
            if kind.what == "file or folder":
                assert "PATH" in shown[flag]


def test_a_flag_that_may_be_given_again_or_has_no_value_is_not_refused(run):
    flags = ["--stop", "x", "--stop", "y", "--json", "--json", "--max-new-tokens", 2]
    assert openmythos("generate", run, *flags).code == 0


def test_a_model_that_a_list_of_names_has_taken_is_asked_for_before_it():
    result = openmythos("eval", "--limit", 3, "--task", "sciq", "runs/nano")
    assert result.err.startswith("openmythos: task='runs/nano' must be one of lambada, hellaswag,")
    assert result.err.endswith(": give MODEL before --task\n")
    alone = openmythos("eval", "runs/nano", "--task", "sciq", "nosuch")
    assert "give MODEL" not in alone.err


def test_every_command_with_a_model_and_a_flag_of_several_values_is_known():
    found = set()
    for name in COMMANDS:
        kinds = {field.name: str(field.type) for field in fields(command_of(name).Settings)}
        several = any(kind.startswith("tuple[") for kind in kinds.values())
        if several and "Positional" in kinds.get("model", ""):
            found.add(name)
    assert found == set(WITH_MODEL)


@pytest.mark.parametrize(("command", "said"), SAID.items(), ids=SAID)
def test_one_sentence_is_said(command, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = openmythos(*command.split())
    assert result.code == 2
    assert result.err.startswith(f"openmythos: {said}")
    assert result.err.count("\n") == 1
    assert not result.out
    assert not list(tmp_path.iterdir())


def test_a_path_that_the_system_refuses_is_told(tmp_path):
    (tmp_path / "file").write_text("no folder")
    text = tmp_path / "text.txt"
    text.write_text("word " * 400)
    result = openmythos("train", "--text", str(text), "--run", str(tmp_path / "file"))
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert str(tmp_path / "file") in result.err
