"""Bits per byte of zpaq, a second yardstick: a mixture of many predictors, learned as it reads.

By the program `zpaq` at its slowest method, where it is installed (Debian: `apt install zpaq`).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from openmythos.training.ppmd import joined

PROGRAM = "zpaq"
METHOD = "-m5"


def bits_per_byte(documents: Iterable[str], given: Iterable[str] = ()) -> float | None:
    """Return 8 (size(given + text) - size(given)) / bytes(text); None without the program.

    Archives of lengths in one power of two are made alike, others are not: where the text takes
    `given` over one, the difference says less.

    Args:
        documents: the text to measure on, not empty.
        given: text that the compressor reads before.
    """
    if shutil.which(PROGRAM) is None:
        return None
    text, before, count = joined(documents, given)
    first = _size(before) if before else 0
    return 8 * (_size(before + text) - first) / count


def _size(text: bytes) -> int:
    """Return the bytes of an archive of a text."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").write_bytes(text)
        subprocess.run(
            [PROGRAM, "add", "archive.zpaq", "text", METHOD, "-t1"],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        return (folder / "archive.zpaq").stat().st_size
