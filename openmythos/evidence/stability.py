"""Learning rates over a factor of 100 and depths to 1,024 loops do not break a looped model.

Four ways for the prelude's output to enter the loop: the package's, whose linear part has a
spectral radius below 1 whatever is learnt; a free diagonal from the same start; h + e, of radius 1;
and one matrix on [h, e], as Huginn's. Each is trained under a recipe that takes away what usually
keeps a training together (see `stress_training`), and under the package's own recipe, at five
rates. Every step's spectral radius and size of the state are watched. The size of the state and the
loss are followed to 1,024 loops, before and after training; and without any training, A is computed
for raw values from -10,000 to 10,000 in three dtypes.

What could refute it: alternatives that stand the same rates; rates that ours does not stand; a loss
of ours that is worse than theirs at rates that all stand; a state that goes on growing with loops.
Where nothing diverges, the section says so, and less is claimed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmythos.evidence import raw_decay, state_growth
from openmythos.evidence.cells import Cell, Result, Say, by_number
from openmythos.evidence.report import Expectation, Section, rounded_down, rounded_up, table
from openmythos.evidence.state_growth import deepest_of, growth
from openmythos.evidence.stress_rows import (
    KINDS,
    OURS,
    RATES,
    RECIPES,
    WITHIN,
    Gap,
    Row,
    Rows,
    largest_radius,
    learns,
    rows_of,
    worst_gaps,
)
from openmythos.evidence.stress_training import (
    STEPS_A_POINT,
    Recipe,
    StressTraining,
    untrained_sizes,
)
from openmythos.evidence.text_training import read_texts, work_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Stability: learning rates over a factor of 100, and 1,024 loops"
SEEDS = 2
NEVER_WORSE = 0.02
"""Nats that two rows may differ by and still count as equal."""

QUICK: dict[str, Any] = {
    "hidden_size": 64,
    "steps": 60,
    "length": 64,
    "vocab_size": 512,
    "measured_tokens": 2048,
    "deepest": 256,
}
QUICK_RATES = (3e-3, 3e-2)


def cells(*, quick: bool, seeds: int) -> list[Cell]:
    """What needs no training, then the trainings: high rates first, all injections at each."""
    more = QUICK if quick else {}
    grid = [
        StressTraining(recipe=recipe, injection=kind, rate=rate, seed=seed, **more)
        for seed in range(1 if quick else seeds)
        for recipe in RECIPES
        for rate in (QUICK_RATES if quick else reversed(RATES))
        for kind in KINDS
    ]
    return [_untrained(more), *map(_cell, grid)]


def _untrained(more: dict[str, Any]) -> Cell:
    """A on a grid of raw values, and the size of the state of models as initialised."""
    models = {
        f"{recipe}/{kind}": StressTraining(recipe=recipe, injection=kind, rate=1e-3, **more)
        for recipe in RECIPES
        for kind in KINDS
    }

    def run(_: Path, say: Say) -> Result:
        say(f"A at raw values of up to {raw_decay.LARGEST:g}")
        radius = raw_decay.measure()
        say("the state of untrained models at many loops")
        states = {name: untrained_sizes(model) for name, model in models.items()}
        loops = next(iter(models.values())).loops
        return {"radius": radius, "states": states, "trained_loops": loops}

    settings = {name: model.as_json() for name, model in models.items()}
    return Cell("untrained", settings, run, trains=False)


def _cell(training: StressTraining) -> Cell:
    name = f"{training.recipe}/{training.injection}/rate-{training.rate:g}/seed-{training.seed}"

    def run(folder: Path, say: Say) -> Result:
        texts = read_texts(work_of(folder, name), training.corpus, training.vocab_size)
        return training.run(folder, texts, say)

    return Cell(name, training.as_json(), run)


def conclude(results: dict[str, Result]) -> Section:
    """Say what the numbers say."""
    rows = rows_of(results)
    untrained = results.get("untrained")
    sentences = [said for recipe in RECIPES for said in _rates(rows, recipe)]
    sentences += _shrunk(rows) + _radii(rows) + state_growth.sentences(rows, untrained)
    tables = [_losses(rows), state_growth.sizes_table(rows, untrained)]
    if untrained is not None:
        sentences.append(raw_decay.sentence(untrained["radius"]))
        tables.append(raw_decay.as_table(untrained["radius"]))
    return Section(
        TITLE,
        sentences,
        [made for made in tables if made],
        [*_rate_expectations(rows), *_bounds(rows, untrained)],
        _notes(rows),
    )


USABLE_NOTE = f"""\
Losses are nats per held-out token, mean over seeds. A rate is usable where every seed stays finite
and learns, and the mean is within {WITHIN} nat of the row's best. In so few steps a low rate is not
unstable but slow: it misses that bound too."""


def _notes(rows: Rows) -> list[str]:
    """What a reader must know of the trainings."""
    if not rows:
        return []
    how = next(iter(rows.values())).all_runs[0]["settings"]
    stress = (
        "Stress: AdamW at one rate for everything, no clipping, no norms on queries and keys, "
        f"gradient through all {how['loops']} loops, {how['steps']} steps of {how['batch_size']} × "
        f"{how['length']} tokens at width {how['hidden_size']}. Full: the package's recipe, Muon "
        "at five times AdamW's rate, with clipping and those norms. All rows have pre-norm layers "
        "and a normed prelude, and the two diagonals start alike."
    )
    return [stress, " ".join(USABLE_NOTE.split())]


def _listed(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates) or "none"


WORDS: dict[Recipe, str] = {"stress": "Under stress", "full": "Under the package's own recipe"}


def _rates(rows: Rows, recipe: Recipe) -> list[str]:
    """What each row stands, ours first."""
    parts = []
    for kind, name in KINDS.items():
        if (row := rows.get((recipe, kind))) is None:
            continue
        part = f"{name} stays finite at {len(row.losses)} of {len(row.runs)} rates"
        steps = [run["diverged_at"] for run in row.all_runs if run["diverged_at"] is not None]
        if steps:
            part += f" (diverging first at step {min(steps)})"
        parts.append(f"{part} and is usable at {_listed(row.usable)}")
    return [f"{WORDS[recipe]}, {'; '.join(parts)}."] if parts else []


def _shrunk(rows: Rows) -> list[str]:
    """What is left of the claim where nothing diverges, and how ours compares where rows stand."""
    said = []
    runs = [run for row in rows.values() for run in row.all_runs]
    if any(kind != OURS for _, kind in rows) and all(run["loss"] is not None for run in runs):
        said.append(
            f"At this size nothing diverges: all {len(runs)} trainings, of every injection at "
            "every rate tried, stay finite to the end. That only a radius below 1 survives high "
            "rates is not shown here; what is left is how the losses compare, and the state's "
            "bound."
        )
    said += _unlearnt(rows)
    for recipe in RECIPES:
        ours = rows.get((recipe, OURS))
        gaps = [] if ours is None else worst_gaps(rows, ours)
        if gaps:
            said.append(_comparison(recipe, gaps))
    return said


def _unlearnt(rows: Rows) -> list[str]:
    """Rates at which a training stayed finite and learnt next to nothing."""
    cases = []
    for (recipe, kind), row in rows.items():
        counts = {rate: _how_many_unlearnt(runs) for rate, runs in row.runs.items()}
        rates = [f"{rate:g}{_of_seeds(count)}" for rate, count in counts.items() if count[0]]
        if rates:
            cases.append(f"{KINDS[kind]} at {', '.join(rates)} ({recipe})")
    if not cases:
        return []
    said = (
        f"To stay finite is not to learn: less than {WITHIN} nat better than by frequencies of "
        f"tokens end {'; '.join(cases)}."
    )
    return [said]


def _how_many_unlearnt(runs: list[Result]) -> tuple[int, int]:
    """How many trainings of a rate stayed finite and learnt next to nothing, and of how many."""
    return sum(run["loss"] is not None and not learns(run) for run in runs), len(runs)


def _of_seeds(count: tuple[int, int]) -> str:
    return "" if count[0] == count[1] else f" in {count[0]} of {count[1]} seeds"


def _comparison(recipe: Recipe, gaps: list[Gap]) -> str:
    worse = [gap for gap in gaps if gap.nats > NEVER_WORSE]
    largest = max(gap.nats for gap in gaps)
    if not worse:
        return (
            f"{WORDS[recipe]}, ours is never worse by more than {NEVER_WORSE} nat: at no rate is "
            f"its loss above an alternative's by more than {rounded_up(largest, 3, signed=True)}."
        )
    cases = [
        f"than {KINDS[gap.kind]} most at {gap.rate:g}, "
        + ("where ours diverges" if math.isinf(gap.nats) else f"by {gap.nats:.3f} nats")
        for gap in worse
    ]
    return f"{WORDS[recipe]}, ours is worse {'; '.join(cases)}."


def _radii(rows: Rows) -> list[str]:
    """The largest spectral radius that was learnt, and whether failing goes with it."""
    learnt = {kind: row for (recipe, kind), row in rows.items() if recipe == "stress"}
    parts = [
        f"{rounded_up(largest_radius(row), 4)} in {KINDS[kind]}"
        for kind, row in learnt.items()
        if kind != "add"
    ]
    if not parts:
        return []
    said = [f"The largest spectral radius at any step under stress is {', '.join(parts)}."]
    free = learnt.get("free")
    if free is not None and free.failed:
        above = [run for run in free.failed if (run["largest_radius"] or math.inf) >= 1]
        said.append(
            f"Of {len(free.failed)} trainings of the free diagonal that failed, {len(above)} had "
            "learnt a radius of 1 or more."
        )
    return said


def _losses(rows: Rows) -> str:
    """Loss of every row at every rate, or where it diverged."""
    if not rows:
        return ""
    rates = sorted({rate for row in rows.values() for rate in row.runs})
    head = ["recipe", "injection", "seeds", *(f"rate {rate:g}" for rate in rates)]
    head += ["best", "largest usable rate", "largest radius", "by frequencies"]
    lines = []
    for row in rows.values():
        frequencies = row.all_runs[0]["frequencies"]
        lines.append(
            [
                row.recipe,
                KINDS[row.kind],
                max(map(len, row.runs.values())),
                *(_outcome(row.runs.get(rate, [])) for rate in rates),
                f"{row.best:.3f}" if row.losses else "not finite",
                f"{max(row.usable):g}" if row.usable else "none",
                rounded_up(largest_radius(row), 4),
                f"{frequencies:.3f}",
            ]
        )
    return table(head, lines)


def _outcome(runs: list[Result]) -> str:
    steps = [run["diverged_at"] for run in runs if run["diverged_at"] is not None]
    if steps:
        return f"diverges at step {min(steps)}"
    losses = [run["loss"] for run in runs]
    if not losses:
        return ""
    if None in losses:
        return "ends not finite"
    count = _how_many_unlearnt(runs)
    mark = f" (nothing learnt{_of_seeds(count)})" if count[0] else ""
    return f"{statistics.fmean(losses):.3f}{mark}"


def _rate_expectations(rows: Rows) -> list[Expectation]:
    """Of the rows that have every rate."""
    made = []
    for recipe in RECIPES:
        ours = rows.get((recipe, OURS))
        if ours is None or not ours.complete:
            continue
        count, usable = len(RATES), len(ours.usable)
        finite = len(ours.losses)
        made += [
            Expectation(
                f"{recipe}: rates at which ours is finite",
                f"{count} of {count}",
                f"{finite} of {count}",
                finite == count,
            ),
            Expectation(
                f"{recipe}: rates within {WITHIN} nat of its best",
                f"≥ {count - 1} of {count}",
                f"{usable} of {count}",
                usable >= count - 1,
            ),
        ]
        others = [
            row
            for (name, kind), row in rows.items()
            if name == recipe and kind != OURS and row.complete
        ]
        if others:
            worst = min(max(row.usable, default=0.0) for row in others)
            made.append(_factor(recipe, max(ours.usable, default=0.0), worst))
    return made


def _factor(recipe: Recipe, ours: float, worst: float) -> Expectation:
    """Compare the largest usable rates; 0 is none."""
    measured, met = "none of ours is usable", False
    if ours:
        factor = ours / worst if worst else math.inf
        measured = rounded_down(factor, 1) if worst else "none of that one is usable"
        met = factor >= 3 - 1e-6  # 3e-3 over 1e-3 may round to less than 3
    what = f"{recipe}: largest usable rate over the worst alternative's"
    return Expectation(what, "≥ 3", measured, met)


SETTLED = 1.05
"""Growth over the last doubling of the loops up to which a state counts as settled."""


def _bounds(rows: Rows, untrained: Result | None) -> list[Expectation]:
    """Of the state of our models, and of A."""
    states = [
        (f"trained, {recipe}", run["states"])
        for (recipe, kind), row in rows.items()
        if kind == OURS
        for run in row.all_runs
        if run["states"] is not None
    ]
    if untrained is not None:
        states += [
            ("untrained", sizes)
            for name, sizes in untrained["states"].items()
            if name.endswith(f"/{OURS}")
        ]
    made = []
    for group in dict.fromkeys(name for name, _ in states):
        sizes = [found for name, found in states if name == group]
        deepest = deepest_of(sizes[0])
        most = max(growth(found, deepest // 2, deepest) for found in sizes)
        what = f"ours, {group}: state at {deepest:,} loops over that at {deepest // 2:,}"
        made.append(Expectation.no_more(what, SETTLED, most, 4))
    if untrained is not None:
        for name, run in untrained["radius"]["ours"].items():
            wrong = raw_decay.wrong_pairs(run)
            made.append(
                Expectation(
                    f"A at raw values of ±1e4, {name}",
                    "in [0, 1), gradients finite",
                    f"{wrong} of {run['pairs']:,} outside",
                    wrong == 0 and run["gradients_finite"] and run["dead"] == 0,
                )
            )
    return made


def draw_figure(results: dict[str, Result]) -> Figure:
    """Loss by rate, the state by loops, and the spectral radius by step, all under stress."""
    from openmythos.training.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, blank

    figure, (left, middle, right) = blank(
        "Training under stress: no clipping, no norms on queries and keys",
        "learning rate",
        "nats per held-out token",
        columns=3,
    )
    colours = dict(zip(KINDS, (ORANGE, BLUE, GREEN, PURPLE), strict=True))
    rows = {kind: row for (recipe, kind), row in rows_of(results).items() if recipe == "stress"}
    for kind, row in rows.items():
        _draw_losses(left, row, colours[kind])
        _draw_states(middle, row, colours[kind])
        _draw_radius(right, row, colours[kind])
    if rows:
        rates = sorted({rate for row in rows.values() for rate in row.runs})
        left.set_xscale("log")
        left.set_xticks(rates, [f"{rate:g}" for rate in rates])
        left.minorticks_off()
        frequencies = next(iter(rows.values())).all_runs[0]["frequencies"]
        left.axhline(frequencies, color=GREY, linestyle=":", label="by frequencies of tokens")
        left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.97))
        _scale_states(middle)
        right.axhline(1, color=GREY, linestyle=":")
    left.set_title("loss at the end, mean over seeds", fontsize=10)
    middle.set_xlabel("loops of the core")
    middle.set_ylabel("size of the state, trained")
    right.set_xlabel("step")
    right.set_ylabel("spectral radius")
    return figure


LARGEST_DRAWN = 1e14
"""Size of the state beyond which only that it grows matters."""


def _draw_losses(axes: Any, row: Row, colour: str) -> None:
    """Losses by rate, and a cross at the level of frequencies where a training diverged."""
    axes.plot(
        list(row.losses), list(row.losses.values()), "o-", color=colour, label=KINDS[row.kind]
    )
    frequencies = row.all_runs[0]["frequencies"]
    for rate in row.runs.keys() - row.losses.keys():
        axes.plot(rate, frequencies, "x", color=colour, markersize=9)


def _draw_states(axes: Any, row: Row, colour: str) -> None:
    """A line for each training; an arrow where it leaves the panel or is no number any more."""
    for run in row.all_runs:
        if run["states"] is None:
            continue
        sizes = by_number(run["states"])
        inside = {n: x for n, x in sizes.items() if x is not None and x <= LARGEST_DRAWN}
        axes.plot(list(inside), list(inside.values()), color=colour, alpha=0.5, linewidth=1)
        if inside and len(inside) < len(sizes):
            deepest = max(inside)
            axes.plot(deepest, inside[deepest], "^", color=colour, markersize=6)


def _scale_states(axes: Any) -> None:
    from openmythos.training.figures import loop_ticks

    loop_ticks(axes, (1, 4, 16, 64, 256, 1024))
    axes.set_yscale("log")
    axes.set_title("a line for each rate and seed; ▲: the next is beyond 10¹⁴", fontsize=10)


def _draw_radius(axes: Any, row: Row, colour: str) -> None:
    """The radius over the first training at the highest rate."""
    fastest = max(row.runs)
    run = row.runs[fastest][0]
    radii = run["course"]["radius"]
    steps = [STEPS_A_POINT * (n + 1) for n in range(len(radii))]
    values = [math.nan if radius is None else radius for radius in radii]
    axes.plot(steps, values, color=colour)
    axes.set_title(f"at rate {fastest:g}, seed {run['settings']['seed']}", fontsize=10)
