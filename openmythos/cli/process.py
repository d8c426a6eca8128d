"""What a command asks of its process (streams, memory, threads), and how it is called again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import sys
from pathlib import Path

SPINS = "2000"
"""How long an idle thread of GNU OpenMP spins before it sleeps. By its default it spins for
milliseconds, and beside another busy process two threads then train ten times slower than one;
with this a step takes the same time alone (9.0 against 9.6 s for 45) and shares well."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_KEPT = 128 << 20
"""Bytes of the largest tensor whose memory is kept. GNU's allocator may keep seven copies of an
aligned block before it gives the first one out again."""
MOST_KEPT = 2**31 - 1
"""Free bytes at the end of the heap above which they are given back."""


def open_closed_streams() -> None:
    """Let a standard stream that the caller has closed read nothing, or go nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def discard_stdout() -> None:
    """Let what stdout still holds go nowhere, or the interpreter would fail on it at its end."""
    with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def prepare() -> None:
    """Set what torch's threads and the C library's memory do, where the user has not."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is loaded
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory for the next tensor; return whether it will.

    By its default a tensor of 32 MB or more is mapped anew, 64 MB at the end of the heap are given
    back, and the system clears each page again when it is first touched: a training step of the
    shipped language model took 1.06 (bf16) and 1.08 (fp32) times as long with one thread, and 1.16
    with two. The price is a peak about 6 % higher. Nothing is asked of other C libraries.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    asked = {_MMAP_THRESHOLD: LARGEST_KEPT, _TRIM_THRESHOLD: MOST_KEPT}
    return all(library.mallopt(key, value) for key, value in asked.items())


def program() -> str:
    """Return what to type for `openmythos`: the path of this one where the shell would not find it.

    So it is where no environment is active, as after `make demo`.
    """
    name = "openmythos"
    own, found = Path(sys.executable).with_name(name), shutil.which(name)
    if not own.is_file() or (found is not None and own.samefile(found)):
        return name
    here = Path.cwd()
    below = here in own.parents[1:]  # in this very folder, the name alone would not be found
    return shlex.quote(str(own.relative_to(here) if below else own))
