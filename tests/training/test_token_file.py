import errno
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmythos.errors import DataError, TokenizerError
from openmythos.training.token_file import TokenFile, write_tokens
from openmythos.training.tokenizer import Tokenizer

BYTES = Tokenizer.train([], vocab_size=257)


def token_file(folder, tokens):
    """A file whose ids are told apart by their place: no two neighbours are equal."""
    path = folder / "train.bin"
    text = "".join(chr(ord("a") + place % 23) for place in range(tokens - 1))
    write_tokens(path, [text], BYTES, source="test", least_tokens=1)
    return TokenFile(path)


@pytest.fixture(scope="module")
def counting_file(tmp_path_factory):
    """A file whose id at place p is p."""
    tokenizer = Tokenizer.train([], vocab_size=257)
    path = tmp_path_factory.mktemp("tokens") / "train.bin"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "encode_batch", lambda texts: [list(range(102))])
        patch.setattr(tokenizer, "end_id", 102)
        write_tokens(path, ["text"], tokenizer, source="test", least_tokens=1)
    return TokenFile(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("tokens"), tokens=103)


def test_a_file_gives_back_the_documents_it_was_made_of(tmp_path):
    documents = ["A whale,\r\n", "näher, 鯨\u0000", " ", "the end"]
    write_tokens(tmp_path / "x.bin", documents, BYTES, source="test", least_tokens=1)
    file = TokenFile(tmp_path / "x.bin")
    assert list(file.texts(BYTES)) == documents
    another = Tokenizer.train(["the end, the end"], vocab_size=259)
    with pytest.raises(TokenizerError, match="must be the one that made"):
        list(file.texts(another))


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 5), length=st.integers(2, 51))
def test_an_epoch_has_every_window_once(counting_file, seed, epoch, length):
    file = counting_file
    count = file.windows_per_epoch(length)
    rows = file.batch(range(epoch * count, (epoch + 1) * count), length, seed=seed)
    assert rows.shape == (count, length + 1)
    # Predicted places lie side by side around the ring: as many as the windows hold, none twice.
    predicted = rows[:, 1:].flatten().tolist()
    assert len(set(predicted)) == len(predicted) == count * length
    assert ((rows[:, 1:] - rows[:, :-1]) % file.tokens == 1).all()


def test_epochs_differ_in_order_and_offset(file):
    count = file.windows_per_epoch(10)
    first, second = (file.batch(range(e * count, (e + 1) * count), 10, seed=1) for e in (0, 1))
    assert {tuple(row) for row in first} != {tuple(row) for row in second}


@given(seed=st.integers(0, 99), samples=st.lists(st.integers(0, 999), min_size=1, max_size=9))
def test_a_batch_depends_on_seed_and_sample_numbers_alone(file, seed, samples):
    batch = file.batch(samples, 10, seed=seed)
    assert batch.dtype == np.int64
    assert batch.shape == (len(samples), 11)
    alone = [file.batch([sample], 10, seed=seed)[0] for sample in reversed(samples)]
    assert (batch == alone[::-1]).all()


@given(tokens=st.integers(2, 90), length=st.integers(1, 40), stride=st.integers(1, 40))
def test_evaluation_windows_count_each_token_once_after_its_context(
    tmp_path_factory, tokens, length, stride
):
    file = token_file(tmp_path_factory.mktemp("tokens"), tokens)
    stride = min(stride, length)
    windows = file.windows(length, stride)
    whole = file.read(np.array([-1]), tokens)[0]
    assert whole[0] == whole[-1] == BYTES.end_id
    counted = []
    for start, first, row in zip(
        windows.starts, windows.first, file.read(windows.starts, windows.length), strict=True
    ):
        assert start >= -1  # so no window sees what comes later
        assert (row == whole[start + 1 : start + 2 + windows.length]).all()
        assert start == -1 or first >= windows.length - stride
        counted += range(start + 1 + first, start + 1 + windows.length)
    assert counted == list(range(tokens))


def test_ids_above_65535_have_four_bytes(tmp_path, monkeypatch):
    tokenizer = Tokenizer.train([], vocab_size=257)
    tokenizer.vocab_size = 1 << 17
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: [[70_000, 3] for _ in texts])
    write_tokens(tmp_path / "a.bin", ["x"], tokenizer, source="test", least_tokens=1)
    assert TokenFile(tmp_path / "a.bin").read(np.array([0]), 2).tolist() == [[70_000, 3, 0]]


def test_a_file_shorter_than_a_window_is_refused(file):
    with pytest.raises(DataError, match="tokens=103 of .* must be at least 201"):
        file.batch([0], 200, seed=0)


@pytest.mark.parametrize("stride", [0, 11])
def test_a_stride_that_skips_tokens_is_refused(file, stride):
    with pytest.raises(DataError, match=f"stride={stride} must be from 1 to length=10"):
        file.windows(10, stride)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda b: b[:-1], "it has 4301 bytes of 4302"),
        (lambda b: b[:100], "its first 4096 bytes are not a header"),
        (lambda b: b"", "its first 4096 bytes are not a header"),
        (lambda b: b + b"\0", "it has 4303 bytes of 4302"),
        (lambda b: b[:-2] + b"\1\0", "its checksum differs"),
        (lambda b: b.replace(b"tokens 1", b"tokens 9"), "its format is 'openmythos tokens 9'"),
        (lambda b: b.replace(b'"dtype"', b'"dtyp?"'), "are not a header"),
    ],
)
def test_damage_is_found_when_the_file_is_opened(tmp_path, damage, sentence):
    path = token_file(tmp_path, tokens=103).path
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        TokenFile(path)
    assert sentence in str(caught.value)
    assert "delete it" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="must be readable .No such file"):
        TokenFile(tmp_path / "train.bin")


def test_too_few_tokens_leave_the_old_file_as_it_was(tmp_path):
    path = token_file(tmp_path, tokens=50).path
    before = path.read_bytes()
    with pytest.raises(DataError, match="tokens=4 to train on, of 3 bytes, must be at least 9"):
        write_tokens(path, ["abc"], BYTES, source="test", least_tokens=9)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["train.bin"]


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "make room for about"), (errno.EACCES, "choose another")]
)
def test_a_disk_that_refuses_is_said_and_leaves_the_old_file_as_it_was(
    tmp_path, monkeypatch, number, advice
):
    path = token_file(tmp_path, tokens=50).path
    before = path.read_bytes()

    def refuse(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", refuse)
    sentence = f"must be written, but {os.strerror(number)}: {advice}"
    with pytest.raises(DataError, match=sentence):
        write_tokens(path, ["abc"], BYTES, source="test", least_tokens=1)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["train.bin"]
