"""Files that are either whole or not there: written beside, made durable, then renamed."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".openmythos-"
"""How the names of unfinished files and folders begin. A training removes those in its run."""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Errors of the system that more free space would mend."""


def write_readably(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a new file, readable to whom new files are: safetensors' is to nobody else.

    Args:
        path: of the file.
        write: writes it.
    """
    path.touch()
    mode = path.stat().st_mode
    write(path)
    path.chmod(mode)


def write_atomically(path: str | Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file so that a reader, a crash or a full disk sees the old one or the new one.

    Args:
        path: of the file.
        content: the bytes, or a function that writes the file at the path it is given.

    Raises:
        OSError: the file cannot be written; what stood at `path` is then untouched.
    """
    path = Path(path)
    # Per process, because two of them may save the same file: the last rename wins.
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        if callable(content):
            write_readably(temporary, content)
        else:
            temporary.write_bytes(content)
        flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            temporary.unlink()
        raise
    flush_to_disk(path.parent)


@contextmanager
def written_together(folder: Path) -> Iterator[Path]:
    """Give a folder to write files into, which take their places in `folder` at the end.

    An error before, or a full disk, leaves `folder` as it was. Only files that are renamed one
    after the other can be seen apart.
    """
    beside = folder / f"{TEMPORARY}{os.getpid()}"
    beside.mkdir(exist_ok=True)
    try:
        yield beside
        for path in sorted(beside.iterdir()):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    flush_to_disk(folder)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, would survive a power cut."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders, and orders renames itself
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
