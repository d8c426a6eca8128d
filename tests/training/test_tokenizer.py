import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, pre_tokenizers

from openmythos.errors import TokenizerError
from openmythos.training import tokenizer as module
from openmythos.training.tokenizer import END, Tokenizer

DOCUMENTS = [
    "The loop thinks, and thinks again; the loop thinks deeper each time.\n\nSo it goes.",
    "Ein Gedanke läuft im Kreis, und läuft, und läuft. 日本語も、絵文字🙂も。",
] * 3

text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(DOCUMENTS, vocab_size=300)


@given(text=text)
def test_any_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=text)
def test_bytes_alone_carry_any_text(text):
    bytes_alone = Tokenizer.train([], vocab_size=257)
    token_ids = bytes_alone.encode(text)
    assert len(token_ids) == len(text.encode())
    assert bytes_alone.decode(token_ids) == text


@given(text=text)
def test_token_bytes_add_up_to_the_bytes_of_the_text(tokenizer, text):
    assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode())


@given(text=text)
def test_streamed_text_is_whole_at_every_moment_and_equals_the_decoded(tokenizer, text):
    stream = tokenizer.text_stream()
    parts = [stream.push(token_id) for token_id in tokenizer.encode(text)]
    assert stream.finish() == ""
    assert "".join(parts) == text


@given(text=text | st.text(" \n\ta.é", min_size=10))
def test_long_texts_have_the_tokens_of_the_whole(tokenizer, text):
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", 3)
        assert tokenizer.encode(text) == whole


def test_the_vocabulary_has_the_size_asked_for_and_the_end_mark_is_zero(tokenizer):
    assert tokenizer.vocab_size == 300
    assert tokenizer.end_id == 0
    assert tokenizer.token_bytes[0] == 0
    assert tokenizer.token_bytes.dtype == np.int64
    assert (tokenizer.token_bytes[1:] >= 1).all()


def test_an_end_mark_written_in_a_text_is_text(tokenizer):
    token_ids = tokenizer.encode(f"one{END}two")
    assert tokenizer.end_id not in token_ids
    assert tokenizer.decode(token_ids) == f"one{END}two"


def test_end_marks_decode_to_nothing(tokenizer):
    assert tokenizer.decode([0, *tokenizer.encode("läuft"), 0]) == "läuft"


def test_only_invalid_bytes_become_replacement_characters(tokenizer):
    first_byte = tokenizer.encode("🙂")[:1]
    assert "�" in tokenizer.decode(first_byte)
    stream = tokenizer.text_stream()
    assert stream.push(first_byte[0]) == ""
    assert stream.finish() == "�"


def test_a_batch_is_encoded_as_its_texts_are(tokenizer):
    texts = ["", "the loop", "läuft\n"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(DOCUMENTS[1]) == tokenizer.encode(DOCUMENTS[1])


def test_the_fingerprint_is_that_of_the_vocabulary_not_of_the_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    assert Tokenizer.load(path).fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(DOCUMENTS, vocab_size=300).fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(DOCUMENTS, vocab_size=299).fingerprint != tokenizer.fingerprint


def test_a_vocabulary_that_text_cannot_fill_stays_smaller():
    assert Tokenizer.train(["ab"], vocab_size=5000).vocab_size < 300


def test_a_tokenizer_of_words_is_refused(tmp_path):
    words = Library(models.WordLevel({"ein": 0, "Wort…": 1, END: 2}, unk_token=END))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="byte-level BPE"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_an_end_mark_is_refused(tmp_path):
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    Library(models.BPE(alphabet, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"must include one of <\|end\|>"):
        Tokenizer.load(tmp_path)


def test_a_file_that_cuts_or_fills_up_texts_does_neither_here(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    library = Library.from_file(str(path))
    library.enable_truncation(8)
    library.enable_padding(length=50)
    library.save(str(path))
    loaded = Tokenizer.load(path)
    assert loaded.fingerprint == tokenizer.fingerprint
    for text in (DOCUMENTS[0] * 9, "a"):
        assert loaded.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", normalizers.Lowercase()),
        ("normalizer", normalizers.NFC()),
        ("pre_tokenizer", pre_tokenizers.Whitespace()),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(tokenizer, tmp_path, part, value):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    library = Library.from_file(str(path))
    setattr(library, part, value)
    library.save(str(path))
    with pytest.raises(TokenizerError, match="must come back unchanged"):
        Tokenizer.load(path)


def test_a_tokenizer_that_draws_lots_is_refused(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["dropout"] = 0.5
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(TokenizerError, match="dropout must be 0"):
        Tokenizer.load(path)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": "1.0", "mod', b"\xff\xfe\x00"])
def test_a_damaged_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match="tokenizer.json"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda t: Tokenizer.load("nowhere.json"), "tokenizer='nowhere.json' must exist"),
        (lambda t: Tokenizer.train([], vocab_size=256), "vocab_size=256 must be at least 257"),
        (lambda t: t.decode([300]), "token_id=300 must be at least 0 and below vocab_size=300"),
        (lambda t: t.decode([-1]), "token_id=-1 must be"),
        (lambda t: t.encode("a\ud800"), "half of a surrogate pair"),
    ],
)
def test_bad_input_is_named_with_its_remedy(tokenizer, call, sentence):
    with pytest.raises(TokenizerError) as caught:
        call(tokenizer)
    assert sentence in str(caught.value)
