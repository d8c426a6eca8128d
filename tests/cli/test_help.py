"""Help pages: each command has one, and it comes at once."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import openmythos as openmythos_cli

import openmythos
from openmythos.cli import COMMANDS, command_of, main
from openmythos.cli.flag_help import wrapped
from openmythos.evidence.claims import CLAIMS

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


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_text_is_wrapped_to_the_terminal_and_its_examples_are_not(
    command, width, monkeypatch
):
    monkeypatch.setenv("COLUMNS", str(width))
    text = command_of(command).__doc__.strip()
    page = openmythos_cli(command, "--help").out
    shown = page.split("\n\n", 1)[1].partition(f"\n {'positional arguments'[:5]}")[0]
    assert " ".join(wrapped(text, width).split()) == " ".join(text.split())
    assert wrapped(text, width) in page, shown
    for line in wrapped(text, width).splitlines():
        assert len(line) <= width or line.startswith("    ") or " " not in line
    for line in text.splitlines():
        assert not line.startswith("    ") or f"{line}\n" in page


def test_paragraphs_are_joined_before_they_are_wrapped():
    text = "One two\nthree four.\n\nExamples:\n    a long example line\nfive\n\nsix"
    wide = "One two three four.\n\nExamples:\n    a long example line\nfive\n\nsix"
    assert wrapped(text, 80) == wide
    assert wrapped(text, 9).startswith(
        "One two\nthree\nfour.\n\nExamples:\n    a long example line\n"
    )


@pytest.mark.parametrize(("said", "painted"), [("", True), ("1", False)])
def test_a_help_page_is_painted_unless_no_color_is_set(said, painted, monkeypatch):
    monkeypatch.setenv("NO_COLOR", said)
    monkeypatch.setenv("TERM", "xterm-256color")
    page = io.StringIO()
    page.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", page)
    with pytest.raises(SystemExit):
        main(["plot", "--help"])
    assert ("\x1b[" in page.getvalue()) == painted


QUICK = {
    "evidence": 0,
    "generate nowhere": 2,
    "chat nowhere": 2,
    "reason libary red": 2,
    "reason library red --seed 3": 2,
    "evidence routing --threads 100000": 2,
    "demo --max-new-tokens 0": 2,
}


@pytest.mark.parametrize(("command", "code"), QUICK.items(), ids=QUICK)
def test_what_needs_no_torch_does_not_wait_for_it(command, code):
    known = ASK.replace("assert not left.code, left.code", f"assert left.code == {code}")
    subprocess.run([sys.executable, "-c", known, *command.split()], check=True, capture_output=True)


def test_the_hours_of_a_claim_are_those_of_its_file():
    page = openmythos_cli("evidence").out
    for name in CLAIMS:
        assert re.search(
            rf"^{name} .* About {CLAIMS[name].hours:g} hours of one core\.$", page, re.M
        )


def test_nothing_advises_to_install_this_package_by_its_name():
    # No index has it: what is missing is named itself, and this package by its checkout.
    package = Path(openmythos.__file__).parent
    advised = re.compile(r"pip install .*\bopenmythos\b(?![-/])")
    for file in package.rglob("*.py"):
        assert not advised.search(file.read_text(encoding="utf-8")), file
