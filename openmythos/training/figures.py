"""How every picture of this package looks, and how it is written.

Matplotlib takes a second to import, so it is imported when something is drawn.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openmythos.errors import InputError
from openmythos.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
BLUE, ORANGE, GREEN, GREY = "#2f6db5", "#d9722e", "#3a8f5c", "#8a8f98"
PURPLE, RED = "#7a5bb0", "#b8434e"
SIZE, DPI = (7.2, 4.2), 150  # inches; dots per inch


def blank(title: str, x: str, y: str, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, row by row; a row's first carries the vertical label."""
    from matplotlib.figure import Figure

    width, height = SIZE
    size = (width * (1 + 0.5 * (columns - 1)), height * (1 + 0.8 * (rows - 1)))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_xlabel(x)
        axes.grid(visible=True, color="#e3e5e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for first in panels[::columns]:
        first.set_ylabel(y)
    return figure, panels


def loop_ticks(axes: Axes, loops: Sequence[int]) -> None:
    """A logarithmic axis whose ticks are the loops measured."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(loops), [str(count) for count in loops])
    axes.minorticks_off()


def save(figure: Figure, path: Path) -> Path:
    """Write a figure, by the path's suffix as PNG, SVG or PDF.

    Raises:
        InputError: another suffix, or the file cannot be written; an old picture then stays.
    """
    check_picture(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda unfinished: figure.savefig(unfinished, dpi=DPI))
    except OSError as error:
        raise InputError(f"picture={str(path)!r} must be writable: {error}") from error
    return path


def check_picture(path: Path) -> None:
    """Raise `InputError` unless a picture can be put there: known suffix, place in a folder.

    Folders that do not exist are made; what stands in their place must not be a file. A picture
    takes the place of a file that can be written to, and of nothing else.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"picture={str(path)!r} must end in one of {', '.join(SUFFIXES)}")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"picture={str(path)!r} must lie in a folder that can be written to")
    if path.exists() and not path.is_file():
        raise InputError(f"picture={str(path)!r} must be a file, and a folder of that name exists")
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"picture={str(path)!r} must be a file that can be written to")
