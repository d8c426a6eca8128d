"""Pictures of a training run, from the lines of its `metrics.jsonl`, and of a depth curve.

Matplotlib takes a second to import, so it is imported when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmythos.errors import CheckpointError
from openmythos.training.figures import BLUE, GREY, ORANGE, blank, loop_ticks, save
from openmythos.training.running_mean import RunningMean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = Mapping[str, Any]


def plot_run(lines: Sequence[Line], folder: Path, name: str) -> list[Path]:
    """Draw every picture that the lines have something for; return the files.

    Args:
        lines: of `metrics.jsonl`.
        folder: where the files go; made when missing.
        name: the run's, for the titles.

    Raises:
        CheckpointError: the run has not finished a step yet.
    """
    if not any("loss" in line for line in lines):
        raise CheckpointError(f"run={name} must have finished a step: there is nothing to draw yet")
    files = []
    for stem, draw in PICTURES.items():
        figure = draw(lines, name)
        if figure is not None:
            files.append(save(figure, folder / f"{stem}.png"))
    return files


def loss(lines: Sequence[Line], name: str) -> Figure | None:
    """Bits per byte over the steps: of each training batch, their mean, and on held-out text.

    What is measured on the way is the start of the held-out text; what is measured at the end, all
    of it, is another figure and no point of that curve.
    """
    steps = [line for line in lines if "loss" in line]
    figure, (axes,) = blank(f"{name}: loss", "optimizer step", "bits per byte")
    x, y = [line["step"] + 1 for line in steps], [line["bits_per_byte"] for line in steps]
    axes.plot(x, y, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(x, _smooth(y), color=BLUE, linewidth=1.8, label="training, smoothed")
    _draw_held_out(axes, lines)
    _leave_out_the_start(axes, _smooth(y))
    skipped = steps[-1].get("skipped", 0)
    if skipped:
        axes.plot([], [], " ", label=f"{skipped} steps skipped")
    axes.legend(frameon=False)
    return figure


def depth(lines: Sequence[Line], name: str) -> Figure | None:
    """Bits per byte of held-out text against loops: on the way, and the end by itself.

    What is measured on the way is the start of the held-out text, and at the end all of it.
    """
    measured = _measurements(lines)
    if not measured or len(measured[-1]["validation"]) < 2:
        return None
    end, finished = measured[-1], measured[-1].get("final", False)
    figure, grid = blank(
        f"{name}: quality against depth",
        "loops of the core",
        "bits per byte, held-out text",
        columns=2 if len(measured) > 1 else 1,
    )
    if len(grid) > 1:
        title = "on the way, start of the text" if finished else "on the way"
        grid[0].set_title(title, fontsize=10)
        shown = _spread(_on_the_way(measured), 6)
        for number, line in enumerate(shown):
            _plot_depths(grid[0], line, _shade((number + 1) / len(shown)), 1.3)
    if finished:
        grid[-1].set_title("at the end, all of the text", fontsize=10)
    elif len(grid) > 1:
        grid[-1].set_title("the last, enlarged", fontsize=10)
    _plot_depths(grid[-1], end, ORANGE, 2.2)
    for axes in grid:
        loop_ticks(axes, [int(loops) for loops in end["validation"]])
        # Beside the panel, which has lines at any height.
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def spectral_radius(lines: Sequence[Line], name: str) -> Figure | None:
    """Largest entry of the injection's diagonal A over the steps."""
    steps = [line for line in lines if "spectral_radius" in line]
    values = [line["spectral_radius"] for line in steps]
    if not values or not all(math.isfinite(value) for value in values):
        return None
    title = f"{name}: spectral radius of the injection"
    figure, (axes,) = blank(title, "optimizer step", "spectral radius of A")
    axes.plot([line["step"] + 1 for line in steps], values, color=BLUE, linewidth=1.8)
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
    axes.annotate(
        "1: the linear part would no longer forget",
        (0.99, 1),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=GREY,
        fontsize=9,
    )
    axes.set_ylim(0, max(1.06, 1.06 * max(values)))
    return figure


def state_rms(lines: Sequence[Line], name: str) -> Figure | None:
    """Root mean square of the state after each loop, at the end and on the way there."""
    measured = _one_a_step([line for line in lines if len(line.get("state_rms", ())) > 1])
    if not measured:
        return None
    from matplotlib.ticker import MaxNLocator

    title = f"{name}: size of the state"
    figure, (axes,) = blank(title, "loops of the core", "root mean square of h")
    shown = _spread(measured, 5)
    for number, line in enumerate(shown):
        rms = line["state_rms"]
        last = number == len(shown) - 1
        colour, width = (ORANGE, 2.2) if last else (_shade((number + 1) / len(shown)), 1.3)
        loops = range(1, len(rms) + 1)
        label = f"step {line['step'] + 1}"
        axes.plot(loops, rms, "o-", color=colour, linewidth=width, markersize=4, label=label)
    axes.set_ylim(0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def expert_load(lines: Sequence[Line], name: str) -> Figure | None:
    """Share of the tokens that each expert got at each loop, one map per core layer."""
    measured = [line for line in lines if line.get("expert_share")]
    if not measured:
        return None
    from matplotlib.figure import Figure

    line = measured[-1]
    share = line["expert_share"]  # loops, layers, experts
    loops, layers, experts = len(share), len(share[0]), len(share[0][0])
    height = 1.6 + min(5.0, max(1.2, 0.28 * experts))
    width = 1.8 + layers * min(5.0, max(2.4, 0.42 * loops))
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{name}: load of the experts, step {line['step'] + 1}", fontsize=12)
    grid = figure.subplots(1, layers, sharey=True, squeeze=False)[0]
    for layer, axes in enumerate(grid):
        table = [[share[t][layer][x] * experts for t in range(loops)] for x in range(experts)]
        image = axes.imshow(
            table, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", origin="lower", rasterized=True
        )
        axes.set_title(f"core layer {layer + 1}", fontsize=10)
        axes.set_xlabel("loop")
        axes.set_xticks(*_ticks(loops))
        axes.set_yticks(*_ticks(experts))
    grid[0].set_ylabel("expert")
    bar = figure.colorbar(image, ax=list(grid), ticks=[0, 0.5, 1, 1.5, 2], shrink=0.9)
    bar.set_label("load, 1 = an equal share")
    bar.ax.set_yticklabels(["0", "0.5", "1", "1.5", "2 or more"])
    return figure


PICTURES = {
    "loss": loss,
    "depth": depth,
    "spectral_radius": spectral_radius,
    "state_rms": state_rms,
    "expert_load": expert_load,
}
"""File names, and what draws them; a picture that has no data is None."""


def depth_curve(
    bits_per_byte: Mapping[int, float],
    title: str,
    *,
    references: Mapping[str, float] | None = None,
    points: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Draw bits per byte against loops.

    Args:
        bits_per_byte: by number of loops.
        title: the figure's.
        references: bits per byte of something without loops, by name: a line across.
        points: mean loops and bits per byte of a halting rule, by name.
    """
    figure, (axes,) = blank(title, "loops of the core", "bits per byte")
    loops, bits = _depth_curve(bits_per_byte)
    axes.plot(loops, bits, "o-", color=BLUE, linewidth=2, markersize=6, label="every token")
    for (label, value), style in zip((references or {}).items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color=GREY, linewidth=1.5, linestyle=style, label=label)
    for label, (mean, value) in (points or {}).items():
        axes.plot([mean], [value], "*", color=ORANGE, markersize=13, label=label)
    loop_ticks(axes, loops)
    axes.legend(frameon=False)
    return figure


def _measurements(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if "validation" in line]


def _on_the_way(measured: Sequence[Line]) -> list[Line]:
    """All but the one at the end, which is of more text."""
    return [line for line in measured if not line.get("final")]


def _one_a_step(measured: Sequence[Line]) -> list[Line]:
    """The last of each step: where the end measures what was measured on the way, too."""
    last = {line["step"]: line for line in measured}
    return [line for line in measured if last[line["step"]] is line]


def _draw_held_out(axes: Axes, lines: Sequence[Line]) -> None:
    measured = _measurements(lines)
    if not measured:
        return
    loops = _best_loops(measured)
    named = f"{loops} {'loop' if loops == '1' else 'loops'}"
    points = sorted((line["step"] + 1, line["validation"][loops]) for line in _on_the_way(measured))
    if points:
        label = f"start of the held-out text, {named}"
        axes.plot(*zip(*points, strict=True), "o-", color=ORANGE, markersize=5, label=label)
    for end in measured:
        if end.get("final"):
            label = f"all held-out text, {named}"
            at = [end["step"] + 1], [end["validation"][loops]]
            axes.plot(*at, "D", color=ORANGE, markersize=7, markerfacecolor="none", label=label)


def _plot_depths(
    axes: Axes, line: Line, colour: str | tuple[float, float, float], width: float
) -> None:
    curve, label = _depth_curve(line["validation"]), f"step {line['step'] + 1}"
    size = 3.2 + 0.8 * width
    axes.plot(*curve, "o-", color=colour, linewidth=width, markersize=size, label=label)


def _best_loops(measured: Sequence[Line]) -> str:
    """The number of loops that did best at the end."""
    last: Mapping[str, float] = measured[-1]["validation"]
    return min(last, key=lambda loops: (last[loops], int(loops)))


def _depth_curve(bits: Mapping[Any, float]) -> tuple[list[int], list[float]]:
    pairs = sorted((int(loops), value) for loops, value in bits.items())
    return [loops for loops, _ in pairs], [value for _, value in pairs]


def _ticks(count: int) -> tuple[list[int], list[str]]:
    """Places and names, from 1, of at most about ten ticks."""
    places = list(range(0, count, max(1, math.ceil(count / 10))))
    return places, [str(place + 1) for place in places]


def _spread(lines: Sequence[Line], most: int) -> list[Line]:
    """At most so many of the lines, evenly spread, the last among them."""
    if len(lines) <= most:
        return list(lines)
    places = [round(k * (len(lines) - 1) / (most - 1)) for k in range(most)]
    return [lines[place] for place in places]


def _shade(share: float) -> tuple[float, float, float]:
    """Greyish blue, darker for later measurements."""
    light, dark = (0.80, 0.86, 0.93), (0.18, 0.43, 0.71)
    red, green, blue = (a + (b - a) * share for a, b in zip(light, dark, strict=True))
    return red, green, blue


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over the last twentieth of the steps, exponentially weighted."""
    mean = RunningMean(keep=1 - 1 / max(1.0, len(values) / 40))
    return [mean.add(value) for value in values]


def _leave_out_the_start(axes: Axes, values: Sequence[float]) -> None:
    """The first steps' loss would flatten all that follows."""
    finite = sorted(value for value in values if math.isfinite(value))
    if len(finite) < 40:
        return
    top, bottom = axes.get_ylim()[1], axes.get_ylim()[0]
    usual = finite[int(0.95 * (len(finite) - 1))]
    axes.set_ylim(bottom, min(top, usual + 0.25 * (usual - finite[0]) + 1e-3))
