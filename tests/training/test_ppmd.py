"""The yardstick: what `pyppmd` itself gives."""

import pyppmd
import pytest

from openmythos.training.corpus import open_corpus
from openmythos.training.ppmd import ORDER, SEPARATOR, bits_per_byte

TEXT = ["the cat sat on the mat and the cat sat on the rat " * 5, "naïve 😀 " * 9]


def size(text):
    encoder = pyppmd.Ppmd7Encoder(ORDER, 1 << 24)
    return len(encoder.encode(text) + encoder.flush())


def test_bits_are_those_of_the_compressed_text():
    parts = [text.encode() for text in TEXT]
    bytes_ = sum(map(len, parts))
    assert bits_per_byte(TEXT) == 8 * size(SEPARATOR.join(parts)) / bytes_


def test_text_read_before_costs_nothing_and_helps():
    joined = SEPARATOR.join(text.encode() for text in TEXT)
    before = joined + SEPARATOR
    bits = 8 * (size(before + joined) - size(before)) / sum(len(text.encode()) for text in TEXT)
    assert bits_per_byte(TEXT, given=TEXT) == bits < 0.5 * bits_per_byte(TEXT)


def test_the_embedded_texts_figure_is_the_documented_one():
    corpus = open_corpus("embedded")
    bits = bits_per_byte(corpus.validation_documents(), corpus.training_documents())
    assert bits == pytest.approx(1.662, abs=0.001)


def test_there_is_no_figure_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyppmd", None)
    assert bits_per_byte(TEXT) is None
