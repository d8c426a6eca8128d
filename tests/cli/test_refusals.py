"""Flags that do not fit: one sentence with the field, the value and what would be right."""

import pytest
from command_line import openmythos

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
}


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
