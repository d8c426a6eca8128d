"""What a command asks of its process."""

import os
import shlex
import subprocess
import sys

import pytest
from command_line import openmythos

from openmythos.cli.demo_command import _what_next
from openmythos.cli.process import program

PROGRAM = """
import os, resource, torch
from openmythos.cli.process import {name}
{name}()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fewest = []
for _ in range(8):  # how many are kept before the first is given again depends on the heap
    before = faults()
    for _ in range(4):
        torch.ones(64 << 20, dtype=torch.uint8)
    fewest.append(faults() - before)
print(min(fewest), os.environ["GOMP_SPINCOUNT"])
"""


def measured(name, environment):
    """Fewest page faults of making four tensors of 64 MB, and the spins of idle threads."""
    program = [sys.executable, "-c", PROGRAM.format(name=name)]
    done = subprocess.run(
        program, env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    faults, spins = done.stdout.split()
    return int(faults), spins


@pytest.mark.skipif(sys.platform != "linux", reason="of GNU's C library")
def test_a_command_keeps_the_memory_of_freed_tensors_unless_the_user_says_otherwise():
    faults, spins = measured("prepare", {})
    assert faults < 4 * 64  # mapped anew, they would be one for each 4 KiB, or each 2 MiB at least
    assert spins == "2000"
    faults, spins = measured("prepare", {"MALLOC_TRIM_THRESHOLD_": "131072", "GOMP_SPINCOUNT": "7"})
    assert faults >= 4 * 32
    assert spins == "7"


def started(tmp_path, shell, *arguments):
    """Let a shell start the command; return its exit code and what both streams got."""
    line = f"{shlex.quote(sys.executable)} -m openmythos {shell}"
    done = subprocess.run(
        ["sh", "-c", line, "sh", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    return done.returncode, done.stdout, done.stderr


NO_ROOM = "openmythos: No space left on device\n"


@pytest.mark.skipif(sys.platform != "linux", reason="of its shell and its /dev/full")
@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("--help | true", 0, ""),  # of the pipe's last
        ("--help >&-", 0, ""),
        ("plot --help >&-", 0, ""),
        ("--version >/dev/full", 2, NO_ROOM),
        ("evidence --help >/dev/full", 2, NO_ROOM),
        ("fly 2>/dev/full", 2, ""),
        ("fly 2>&-", 2, ""),
        ("fly >&-", 2, "openmythos: command='fly' must be one of"),
        ("generate nowhere --prompt - <&-", 2, "openmythos: model='nowhere' must be the folder"),
    ],
)
def test_streams_that_are_full_closed_or_not_read_end_in_no_traceback(shell, code, said, tmp_path):
    left, out, err = started(tmp_path, shell)
    assert (left, out) == (code, "")
    assert err.startswith(said)
    assert err.count("\n") == (said != "")


@pytest.mark.skipif(sys.platform == "win32", reason="of its shell")
def test_a_text_is_written_and_a_chat_ends_where_streams_are_closed(run, tmp_path):
    flags = "--max-new-tokens 3 --seed 1"
    assert started(tmp_path, f'generate "$1" {flags} --prompt - <&-', run)[::2] == (0, "")
    assert started(tmp_path, f'generate "$1" {flags} --prompt The >&-', run) == (0, "", "")
    assert started(tmp_path, f'chat "$1" {flags} <&-', run) == (0, "", "")


def test_ctrl_c_while_a_command_is_imported_ends_in_no_traceback(monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("openmythos.cli.command_of", interrupted)
    result = openmythos("plot", "runs/x")
    assert (result.code, result.out, result.err) == (130, "", "")


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment's folder of programs, which is not on the path."""
    folder = tmp_path / "my env" / "bin"
    folder.mkdir(parents=True)
    (folder / "openmythos").touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_command_is_named_so_that_the_shell_finds_it(environment, tmp_path, monkeypatch):
    assert program() == "'my env/bin/openmythos'"
    (tmp_path / "openmythos").touch(mode=0o755)  # another environment's
    assert program() == "'my env/bin/openmythos'"
    monkeypatch.chdir(environment)
    assert program() == shlex.quote(str(environment / "openmythos"))
    monkeypatch.setenv("PATH", f"{environment}{os.pathsep}{tmp_path}")
    assert program() == "openmythos"


def test_what_the_demo_says_to_try_next_begins_with_that_name(environment, tmp_path):
    page = _what_next(tmp_path / "demo")
    lines = [line.strip() for line in page.splitlines() if line.startswith("  ")]
    assert [line.split("openmythos' ")[1].split()[0] for line in lines] == [
        "generate",
        "chat",
        "eval",
        "info",
        "train",
    ]
