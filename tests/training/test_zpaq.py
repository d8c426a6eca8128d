"""The second yardstick: the sizes of the program's archives."""

import shutil
import stat

import pytest

from openmythos.training import zpaq
from openmythos.training.ppmd import SEPARATOR

TEXT = ["the cat sat on the mat and the cat sat on the rat " * 5, "naïve 😀 " * 9]
BYTES = sum(len(text.encode()) for text in TEXT)
STAND_IN = """#!/bin/sh
[ "$1 $4 $5" = "add -m5 -t1" ] || exit 2
head -c "$(( $(wc -c < "$3") / 2 ))" "$3" > "$2"
"""


@pytest.fixture
def half(tmp_path, monkeypatch):
    """A program whose archives are half as long as the text."""
    program = tmp_path / "zpaq"
    program.write_text(STAND_IN)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.usefixtures("half")
def test_bits_are_those_of_the_archive_and_text_read_before_costs_nothing():
    length = BYTES + len(SEPARATOR)
    assert zpaq.bits_per_byte(TEXT) == 8 * (length // 2) / BYTES
    before = length + len(SEPARATOR)
    assert zpaq.bits_per_byte(TEXT, TEXT) == 8 * ((before + length) // 2 - before // 2) / BYTES


@pytest.mark.skipif(shutil.which("zpaq") is None, reason="zpaq is not installed")
def test_the_program_itself_takes_less_for_a_text_it_has_read():
    assert zpaq.bits_per_byte(TEXT, TEXT) < 0.5 * zpaq.bits_per_byte(TEXT)


def test_there_is_no_figure_without_the_program(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert zpaq.bits_per_byte(TEXT) is None
