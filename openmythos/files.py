"""Files that are either whole or not there: written beside, made durable, then renamed."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

TEMPORARY = ".openmythos-"
"""How the names of unfinished files and folders begin. None outlives the next start."""


def write_atomically(path: str | Path, content: bytes | Callable[[Path], object]) -> None:
    """Writes a file so that a reader, a crash or a full disk sees the old one or the new one.

    `content` is the bytes, or a function that writes the file at the path it is given. Raises
    OSError where the file cannot be written; what stood at `path` is then untouched.
    """
    path = Path(path)
    # Per process, because two of them may save the same file: the last rename wins.
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        if callable(content):
            temporary.touch()  # some writers make a file that nobody else may read
            mode = temporary.stat().st_mode
            content(temporary)
            temporary.chmod(mode)
        else:
            temporary.write_bytes(content)
        flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            temporary.unlink()
        raise
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, would survive a power cut."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders, and orders renames itself
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
