"""One process at a time for a run's folder."""

from __future__ import annotations

import os
import secrets
import sys
import weakref
from pathlib import Path

from openmythos.errors import CheckpointError

LOCK = ".openmythos.lock"
"""Hidden, so that it is no text; named otherwise than unfinished files, which are removed."""


class RunLock:
    """Keeps other processes from training a run: until its release, or the end of its process.

    A forked process shares it, and does not release it by its own end. Where the system or the
    folder has no locks, nothing is kept from anybody; nor is a second one of the same process,
    where a name may still hold the trainer before.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._close: weakref.finalize[[int], RunLock] | None = None

    def take(self) -> None:
        """Take it where it is not taken.

        Raises:
            CheckpointError: another process has it.
        """
        if self._close is None and (descriptor := _locked(self.run)) is not None:
            # Closed and not unlocked: a forked process that did so would unlock it for all.
            self._close = weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Let others train the run; nothing happens the second time."""
        if self._close is not None:
            self._close()
            self._close = None


_OURS = secrets.token_hex(8)
"""Tells this process from one of the same number in another container."""


def _locked(run: Path) -> int | None:
    """Return the descriptor of the locked file; None where there are no locks, or it is ours."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # whatever is wrong with the folder, what is written next tells it
        return None
    us = f"{os.getpid()} {_OURS}"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, us.encode())
    except BlockingIOError:
        holder = os.read(descriptor, 100).decode(errors="replace")
        os.close(descriptor)
        if holder == us:
            return None
        pid = holder.partition(" ")[0] or "another"
        raise CheckpointError(
            f"run={run} must be trained by one process at a time, and process {pid} is at it: "
            "wait for its end, or stop it"
        ) from None
    except OSError:  # no locks here, or no room for the number
        pass
    return descriptor
