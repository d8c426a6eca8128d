"""How every picture of this package looks, and how it is written.

Matplotlib takes a second to import, so it is imported when something is drawn.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openmythos.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
BLUE, ORANGE, GREEN, GREY = "#2f6db5", "#d9722e", "#3a8f5c", "#8a8f98"
PURPLE, RED = "#7a5bb0", "#b8434e"
SIZE, DPI = (7.2, 4.2), 150  # inches; dots per inch


def blank(title: str, x: str, y: str, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, whose first carries the label of the vertical axis."""
    from matplotlib.figure import Figure

    width, height = SIZE
    figure = Figure(figsize=(width * (1 + 0.5 * (columns - 1)), height), layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        axes.set_xlabel(x)
        axes.grid(visible=True, color="#e3e5e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(y)
    return figure, panels


def loop_ticks(axes: Axes, loops: Sequence[int]) -> None:
    """A logarithmic axis whose ticks are the loops measured."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(loops), [str(count) for count in loops])
    axes.minorticks_off()


def save(figure: Figure, path: Path) -> Path:
    """Write a figure, by the path's suffix as PNG, SVG or PDF.

    Raises:
        InputError: another suffix, or the file cannot be written.
    """
    check_picture(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise InputError(f"picture={str(path)!r} must be writable: {error}") from error
    return path


def check_picture(path: Path) -> None:
    """Raise `InputError` unless a picture can be put there: known suffix, place in a folder.

    Folders that do not exist are made; what stands in their place must not be a file.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"picture={str(path)!r} must end in one of {', '.join(SUFFIXES)}")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"picture={str(path)!r} must lie in a folder that can be written to")
