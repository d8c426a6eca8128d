"""Compile the C code once for this processor, keep the result, and load it.

Without a C compiler, or with `OPENMYTHOS_NATIVE=0`, there is no native code and torch's own
operations do the same work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from openmythos.files import write_atomically
from openmythos.model.native.structures import (
    STRUCTURES,
    CallStructure,
    CoreStructure,
    LayerStructure,
    LinearStructure,
    ModelStructure,
    OuterStructure,
)

SOURCE = Path(__file__).with_name("layer.c")
PARTS = ("vectors.h", "rooms.h", "digits.h", "tiles.h", "products.h", "attention.h")
"""What it includes."""
FLAGS = (
    "-O3",
    "-march=native",
    "-std=gnu11",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-shared",
    "-fPIC",
)
SECONDS = 120
"""A compiler that takes longer is given up."""


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled code; None where there is none."""
    if os.environ.get("OPENMYTHOS_NATIVE", "1") == "0" or sys.platform == "win32":
        return None
    for compiler in _compilers():
        with suppress(OSError, subprocess.SubprocessError):  # no place to write, or it fails
            return _load(_compiled(compiler))
    return None


def _compilers() -> list[str]:
    names = [os.environ.get("CC"), "cc", "gcc", "clang"]
    return list(dict.fromkeys(found for name in names if name and (found := shutil.which(name))))


def _folder() -> Path:
    """Where compiled code is kept: never in a folder that others write to, as it is loaded.

    Raises:
        OSError: the user has no home directory.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # neither HOME nor an entry in the list of users
        raise OSError("there is no place to keep compiled code: set XDG_CACHE_HOME") from error
    return Path(base) / "openmythos"


def _compiled(compiler: str) -> Path:
    """Return the compiled file, made where it is not there yet."""
    told = subprocess.run([compiler, "--version"], capture_output=True, timeout=SECONDS, check=True)
    code = [path.read_bytes() for path in (SOURCE, *map(SOURCE.with_name, PARTS))]
    parts = (*code, told.stdout, " ".join(FLAGS).encode(), _processor())
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    path = _folder() / f"layer-{name}.so"
    digest = path.with_suffix(".sha256")
    if _is_whole(path, digest):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "layer.so"
        for extra in (["-fopenmp"], []):  # clang may have no OpenMP: one thread then
            command = [compiler, *FLAGS, *extra, str(SOURCE), "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
            if done.returncode == 0:
                write_atomically(digest, _sha256(made))
                made.replace(path)
                return path
    raise OSError(f"{compiler} cannot compile {SOURCE}: {done.stderr.decode(errors='replace')}")


def _is_whole(path: Path, digest: Path) -> bool:
    """Whether a kept file is what was compiled: loading a damaged one ends the process."""
    return path.is_file() and digest.is_file() and digest.read_bytes() == _sha256(path)


def _sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).hexdigest().encode()


def _processor() -> bytes:
    """What `-march=native` depends on: a kept file must not be used on another processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().encode()
    words = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(words))).encode()


def _load(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    found.structure_sizes.argtypes, found.structure_sizes.restype = [pointer], None
    _check_sizes(found)
    layer, call = ctypes.POINTER(LayerStructure), ctypes.POINTER(CallStructure)
    found.work_size.argtypes, found.work_size.restype = [layer, number, number, number], number
    found.run_layer.argtypes, found.run_layer.restype = [layer, call], None
    found.run_core.argtypes = [ctypes.POINTER(CoreStructure), call]
    found.run_core.restype = None
    found.run_outer.argtypes = [ctypes.POINTER(OuterStructure), call]
    found.run_outer.restype = None
    found.run_model.argtypes = [ctypes.POINTER(ModelStructure), *(call,) * 3]
    found.run_model.restype = ctypes.c_int
    found.run_linear.argtypes = [
        ctypes.POINTER(LinearStructure),
        *(pointer, number),  # rows
        *(pointer, pointer, number),  # result, scratch, threads
    ]
    found.run_linear.restype = None
    found.run_constants.argtypes = [
        *(pointer, pointer, number),  # raw numbers
        *(ctypes.c_float, ctypes.c_float),  # floor, largest step
        *(pointer, pointer),  # results
    ]
    found.run_constants.restype = None
    for switch in (found.use_tiles, found.use_digits):
        switch.argtypes, switch.restype = [ctypes.c_int], ctypes.c_int
    return found


def _check_sizes(code: ctypes.CDLL) -> None:
    """Refuse code that would read structures otherwise than they are written here: our mistake."""
    sizes = (ctypes.c_int64 * len(STRUCTURES))()
    code.structure_sizes(sizes)
    for (name, structure), there in zip(STRUCTURES.items(), sizes, strict=True):
        here = ctypes.sizeof(structure)
        assert here == there, f"{name} has {here} bytes here and {there} in {SOURCE.name}"
