"""Help pages: each command has one, and it comes at once."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import openmythos
from openmythos.cli import COMMANDS

ASK = """
import sys, time
from openmythos.cli import main
try:
    main(sys.argv[1:])
except SystemExit as left:
    assert not left.code, left.code
slow = {"torch", "matplotlib", "tokenizers"} & set(sys.modules)
assert not slow, slow
assert time.process_time() < 1.5, time.process_time()
"""


def ask(*arguments):
    """In a process of its own, because this one has torch."""
    command = [sys.executable, "-c", ASK, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_page_with_an_example_and_no_slow_import(command):
    # On a quiet machine it takes 0.3 s; the bound allows for load, and for no import of torch.
    page = ask(command, "--help")
    assert f"usage: openmythos {command}" in page
    assert f"    openmythos {command}" in page.split("options")[0]


def test_the_overview_names_every_command():
    page = ask("--help")
    assert all(f"  {command} " in page for command in COMMANDS)
    assert ask() == page
    assert ask("help") == page
    assert ask("help", "reason") == ask("reason", "--help")


def test_the_version_is_told():
    assert ask("--version").startswith("openmythos ")


def test_a_flags_text_is_one_paragraph_whatever_its_docstrings_lines():
    page = " ".join(ask("train", "--help").replace("\u2502", " ").split())
    assert "must not have begun to decay yet; the result is that of a run started" in page
    assert "Key and value heads of `gqa`; must divide num_heads" in page
    assert "--model.qk-norm {True,False}" in page
    assert "usage: openmythos generate [-h] [MODEL] [OPTIONS]\n" in ask("generate", "--help")


def test_nothing_advises_to_install_this_package_by_its_name():
    # No index has it: what is missing is named itself, and this package by its checkout.
    package = Path(openmythos.__file__).parent
    advised = re.compile(r"pip install .*\bopenmythos\b(?![-/])")
    for file in package.rglob("*.py"):
        assert not advised.search(file.read_text(encoding="utf-8")), file
