"""Flags that do not fit: one sentence with the field, the value and what would be right."""

from dataclasses import fields

import pytest
from command_line import openmythos

from openmythos.cli import COMMANDS, command_of
from openmythos.cli.refusals import WITH_MODEL

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
}


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
