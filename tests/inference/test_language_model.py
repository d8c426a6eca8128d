"""Text in, text out: whole characters, stop strings, ends of documents."""

import itertools
import re

import pytest
import torch
from tiny import tiny
from typecheck import unchecked

import openmythos
from openmythos.errors import CheckpointError, InputError, TokenizerError
from openmythos.inference import language_model
from openmythos.inference.generate import NewToken
from openmythos.inference.language_model import LanguageModel
from openmythos.model.int8 import Int8Weight
from openmythos.model.native import describe
from openmythos.model.native.build import library
from openmythos.training.tokenizer import Tokenizer

TEXT = "the cat sat on the mat and the cat ate the rat " * 20


@pytest.fixture(scope="module")
def lm():
    tokenizer = Tokenizer.train([TEXT], vocab_size=280)
    return LanguageModel(tiny(vocab_size=tokenizer.vocab_size), tokenizer)


def writes(monkeypatch, token_ids, loops=None):
    """Let generation yield these tokens, whatever the model thinks."""

    def generate(*_, **__):
        for token_id, taken in zip(token_ids, loops or itertools.repeat(3), strict=False):
            yield NewToken(torch.tensor([token_id]), torch.tensor([taken]))

    monkeypatch.setattr(language_model, "generate", generate)


def byte_ids(lm, text):
    """One token for each byte, so that every boundary falls inside of words and characters."""
    return [lm.tokenizer.encode(chr(b))[0] if b < 128 else byte_id(lm, b) for b in text.encode()]


def byte_id(lm, byte):
    return next(
        token_id
        for token_id in range(lm.tokenizer.vocab_size)
        if lm.tokenizer.decode_bytes([token_id]) == bytes([byte])
    )


def test_generate_is_the_stream_joined(lm):
    options = {"max_new_tokens": 20, "seed": 3}
    pieces = list(lm.stream("the cat", **options))
    assert lm.generate("the cat", **options) == "".join(piece.text for piece in pieces)
    assert len([piece for piece in pieces if piece.token_id is not None]) <= 20


def test_text_stops_at_a_string_wherever_tokens_begin(lm, monkeypatch):
    writes(monkeypatch, byte_ids(lm, "one STO two STOP three"))
    pieces = list(lm.stream(stop=["STOP"]))
    assert "".join(piece.text for piece in pieces) == "one STO two "
    assert len(pieces) == len("one STO two STOP")


def test_characters_of_several_tokens_come_whole(lm, monkeypatch):
    writes(monkeypatch, byte_ids(lm, "naïve 😀"))
    texts = [piece.text for piece in lm.stream()]
    assert "".join(texts) == "naïve 😀"
    assert texts.count("ï") == texts.count("😀") == 1


def test_what_is_held_back_comes_at_the_end_without_a_token(lm, monkeypatch):
    writes(monkeypatch, byte_ids(lm, "abcST"), loops=[1, 2, 3, 4, 5])
    pieces = list(lm.stream(stop="STOP"))
    assert [piece.text for piece in pieces] == ["a", "b", "c", "", "", "ST"]
    assert pieces[-1].token_id is None
    assert [piece.loops for piece in pieces] == [1, 2, 3, 4, 5, 5]


def ending(pieces):
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def test_the_stream_returns_why_it_ended(lm, monkeypatch):
    end = lm.tokenizer.end_id
    assert ending(lm.stream("the", max_new_tokens=1, seed=1)) == "length"
    writes(monkeypatch, [*byte_ids(lm, "ab STOP c"), end])
    assert ending(lm.stream()) == "end"
    assert ending(lm.stream(stop="STOP")) == "stop"
    assert ending(lm.stream(stop="STOP c!")) == "end"
    writes(monkeypatch, byte_ids(lm, "ab"))
    assert ending(lm.stream()) == "length"


def test_a_model_says_what_it_is(lm):
    count = sum(p.numel() for p in lm.model.parameters())
    assert repr(lm) == (
        f"LanguageModel({count / 1e6:.2f} M parameters, vocab_size={lm.tokenizer.vocab_size}, "
        f"max_length=64, mean_loops={lm.model.config.mean_loops}, fp32 on cpu)"
    )


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_a_model_says_what_its_weights_are(lm, kind, tmp_path):
    lm.save(tmp_path)
    assert f", {kind} on cpu)" in repr(openmythos.load(tmp_path, kind))


def test_a_document_ends_at_its_end_mark(lm, monkeypatch):
    writes(monkeypatch, [*byte_ids(lm, "ab"), lm.tokenizer.end_id, *byte_ids(lm, "cd")])
    assert lm.generate() == "ab"


def test_no_document_is_empty(lm, monkeypatch):
    end = lm.tokenizer.end_id

    def ends(self, h):
        logits = type(self).readout(self, h)
        logits[..., end] += 100
        return logits

    monkeypatch.setattr(lm.model, "readout", ends.__get__(lm.model))
    pieces = [piece for piece in lm.stream("", seed=1) if piece.token_id is not None]
    assert len(pieces) == 1  # and then it ends
    assert pieces[0].token_id != end
    assert list(lm.stream("a", seed=1)) == []


@pytest.mark.parametrize("options", [{"loops": 0}, {"halting": "gate", "threshold": 7}])
def test_what_does_not_fit_is_refused_before_the_first_piece_is_asked_for(lm, options):
    with pytest.raises(InputError, match="must be"):
        lm.stream("a", **options)


def test_text_ends_where_max_length_is_reached(lm):
    prompt = "cat " * 20
    room = lm.model.config.max_length - 1 - len(lm.tokenizer.encode(prompt))
    made = [p for p in lm.stream(prompt, max_new_tokens=999, seed=0) if p.token_id is not None]
    assert len(made) <= room
    with pytest.raises(InputError, match=", and must leave room within max_length=64: shorten it"):
        lm.generate("xyz " * 64)


def test_an_empty_stop_is_refused(lm):
    with pytest.raises(InputError, match="stop must hold no empty string"):
        lm.stream(stop=["x", ""])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt": None}, "prompt=None must be a string"),
        ({"prompt": 7}, "prompt=7 must be a string"),
        ({"stop": 5}, "stop=5 must be a string or a list of strings"),
        ({"stop": ["x", 5]}, "stop holds 5, must hold strings"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be an integer of 1 or more"),
        ({"max_new_tokens": "4"}, "max_new_tokens='4' must be an integer of 1 or more"),
        ({"loops": 2.5}, "loops=2.5 must be"),
        ({"seed": "1"}, "seed='1' must be an integer"),
    ],
    ids=str,
)
def test_values_of_a_wrong_type_are_refused(lm, options, sentence):
    with unchecked(), pytest.raises(InputError, match=sentence):
        lm.generate(**options)


@pytest.mark.parametrize("name", [None, 3, ["openmythos-lm"]])
def test_what_is_no_name_is_not_loaded(name):
    with (
        unchecked(),
        pytest.raises(InputError, match="must be a folder, or the name of a shipped model"),
    ):
        openmythos.load(name)


def test_a_tokenizer_of_another_model_is_refused(lm):
    with pytest.raises(CheckpointError, match="must have at most the model's 50: it belongs to"):
        LanguageModel(tiny(), lm.tokenizer)


def test_ids_that_the_tokenizer_has_no_text_for_are_never_drawn(lm):
    larger = LanguageModel(tiny(vocab_size=4 * lm.tokenizer.vocab_size), lm.tokenizer)
    pieces = list(larger.stream("a", max_new_tokens=40, temperature=50.0, seed=1))
    drawn = [piece.token_id for piece in pieces if piece.token_id is not None]
    assert drawn
    assert max(drawn) < lm.tokenizer.vocab_size


def test_a_saved_model_writes_the_same(lm, tmp_path):
    lm.save(tmp_path)
    again = openmythos.load(tmp_path)
    assert again.generate("the", seed=1) == lm.generate("the", seed=1)
    assert again.trained_length == lm.trained_length


def test_a_gate_that_was_never_trained_is_told(lm, tmp_path):
    LanguageModel(lm.model, lm.tokenizer, trained_length=48, gate_trained=False).save(tmp_path)
    again = openmythos.load(tmp_path)
    with pytest.warns(UserWarning, match="halting='gate' has a gate that was not trained"):
        again.generate("the", max_new_tokens=1, halting="gate")
    again.generate("the", max_new_tokens=1, halting="delta")


def test_a_model_keeps_the_length_it_was_trained_at(lm, tmp_path):
    LanguageModel(lm.model, lm.tokenizer, trained_length=48).save(tmp_path / "a")
    again = openmythos.load(tmp_path / "a")
    again.save(tmp_path / "b")
    assert openmythos.load(tmp_path / "b").trained_length == 48
    assert openmythos.load("openmythos-lm").trained_length == 512


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_a_model_is_put_where_it_is_wanted(lm, device, tmp_path):
    lm.save(tmp_path)
    again = openmythos.load(tmp_path, device=device)
    assert again.model.embed.weight.device == torch.device("cpu")
    assert again.generate("the", seed=1) == lm.generate("the", seed=1)


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "cpu cpu", 2.5])
def test_a_device_that_is_not_there_is_refused_before_the_model_is_read(device, tmp_path):
    sentence = "must be one that torch finds here, as 'cpu' is, but: "
    with unchecked(), pytest.raises(InputError, match=sentence) as refused:
        openmythos.load(tmp_path / "nowhere", device=device)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_int8_weights_of_a_file_stay_so_where_native_code_multiplies_them(
    lm, kind, native, tmp_path, monkeypatch
):
    if not native:
        monkeypatch.setattr(describe, "library", lambda: None)
    elif library() is None:
        pytest.skip("no compiler here")
    model = tiny(vocab_size=lm.tokenizer.vocab_size, hidden_size=32, head_dim=8)
    LanguageModel(model, lm.tokenizer).save(tmp_path, kind)
    weight = openmythos.load(tmp_path, "file").model.embed.weight
    assert isinstance(weight, Int8Weight) == (native and kind == "int8")
    assert weight.dtype == torch.float32


def test_int8_weights_of_a_file_are_widened_where_the_native_code_does_not_know_the_model(tmp_path):
    tokenizer = Tokenizer.train([TEXT], vocab_size=280)
    odd = tiny(vocab_size=tokenizer.vocab_size, hidden_size=20, num_heads=2, head_dim=10)
    LanguageModel(odd, tokenizer).save(tmp_path, "int8")
    assert not isinstance(openmythos.load(tmp_path, "file").model.embed.weight, Int8Weight)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json must be JSON"):
        openmythos.load(tmp_path, "file")


def test_int8_weights_stay_on_the_cpu(lm, tmp_path):
    lm.save(tmp_path)
    with pytest.raises(InputError, match="device='meta' must be 'cpu' with weights='int8'"):
        openmythos.load(tmp_path, weights="int8", device="meta")
    assert openmythos.load(tmp_path, weights="int8", device="cpu").generate("the", seed=1)


def test_a_device_that_only_has_shapes_is_refused(lm, tmp_path):
    lm.save(tmp_path)
    with pytest.raises(InputError, match="device='meta' must be one that computes, as 'cpu' does"):
        openmythos.load(tmp_path, device="meta")


def test_a_runs_folder_is_no_models_and_says_where_its_model_is(lm, tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a training run's: give openmythos.load$"):
        openmythos.OpenMythos.from_pretrained(tmp_path)
    lm.save(tmp_path / "model")
    named = re.escape(f"a training run's: give {tmp_path / 'model'}, or openmythos.load")
    with pytest.raises(CheckpointError, match=named):
        openmythos.OpenMythos.from_pretrained(tmp_path)
    assert openmythos.OpenMythos.from_pretrained(tmp_path / "model")
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(
            CheckpointError, match="must be a folder, and it or one above is a file"
        ):
            lm.save(place)


@pytest.mark.parametrize(
    ("missing", "error", "sentence"),
    [
        ("config.json", CheckpointError, "must hold settings.json"),
        ("model.safetensors", CheckpointError, "must exist"),
        ("tokenizer.json", TokenizerError, "must have a tokenizer.json beside its weights"),
    ],
)
def test_a_model_with_a_file_missing_is_refused(lm, tmp_path, missing, error, sentence):
    lm.model.save_pretrained(tmp_path, lm.tokenizer)
    (tmp_path / missing).unlink()
    with pytest.raises(error, match=sentence):
        openmythos.load(tmp_path)


def test_a_model_that_reads_no_text_is_named():
    with pytest.raises(TokenizerError, match="must be one that reads text: walks are for"):
        openmythos.load("openmythos-reasoner")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="must be the folder of a model or of a run"):
        openmythos.load(tmp_path / "nothing")
