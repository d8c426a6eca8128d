"""Learning rates over a factor of 100 and depths to 1,024 loops do not break a looped model.

Four ways for the prelude's output to enter the loop: the package's, whose linear part has a
spectral radius below 1 whatever is learnt; a free diagonal from the same start; h + e, of radius 1;
and one matrix on [h, e], as Huginn's. Each is trained under a recipe that takes away what usually
keeps a training together (see `stress_training`), at five rates; the first and third also under the
package's own recipe. Every step's spectral radius and size of the state are watched. The size of
the state is followed to 1,024 loops, before and after training; and without any training, A is
computed for raw values from -10,000 to 10,000 in three dtypes.

What could refute it: alternatives that stand the same rates; rates that ours does not stand; a loss
of ours that is worse than theirs at rates that all stand; a state that goes on growing with loops.
Where nothing diverges, the section says so, and less is claimed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from openmythos.config import InjectionKind
from openmythos.evidence import raw_decay
from openmythos.evidence.cells import Cell, Result, Say
from openmythos.evidence.report import Expectation, Section, table
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
HOURS = 4.0
"""Of one core, for everything with two seeds."""

OURS: InjectionKind = "lti"
KINDS: dict[InjectionKind, str] = {
    OURS: "A h + B e, A < 1 (ours)",
    "free": "a h + B e, a free",
    "add": "h + e",
    "linear": "W [h, e]",
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
MOST_SEEDS = 2
WITHIN = 0.1
"""Nats above a row's best rate up to which a rate is usable."""
NEVER_WORSE = 0.02
"""Nats that two rows may differ by and still count as equal."""
RECIPES: dict[Recipe, tuple[InjectionKind, ...]] = {"stress": tuple(KINDS), "full": (OURS, "add")}

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
    """What needs no training, then the trainings, those under stress first."""
    more = QUICK if quick else {}
    grid = [
        StressTraining(recipe=recipe, injection=kind, rate=rate, seed=seed, **more)
        for recipe, kinds in RECIPES.items()
        for seed in range(1 if quick else min(seeds, MOST_SEEDS))
        for rate in (QUICK_RATES if quick else RATES)
        for kind in kinds
    ]
    return [_untrained(more), *map(_cell, grid)]


def _untrained(more: dict[str, Any]) -> Cell:
    """A on a grid of raw values, and the size of the state of models as initialised."""
    models = {
        f"{recipe}/{kind}": StressTraining(recipe=recipe, injection=kind, rate=1e-3, **more)
        for recipe, kinds in RECIPES.items()
        for kind in kinds
    }

    def run(_: Path, say: Say) -> Result:
        say(f"A at raw values of up to {raw_decay.LARGEST:g}")
        forms = {"ours": raw_decay.ours, "on paper": raw_decay.on_paper}
        radius = {
            form: {name: measure(dtype) for name, dtype in raw_decay.DTYPES.items()}
            for form, measure in forms.items()
        }
        say("the state of untrained models at many loops")
        states = {name: untrained_sizes(model) for name, model in models.items()}
        loops = next(iter(models.values())).loops
        return {"radius": radius, "states": states, "trained_loops": loops}

    settings = {name: model.as_json() for name, model in models.items()}
    return Cell("untrained", settings, run)


def _cell(training: StressTraining) -> Cell:
    name = f"{training.recipe}/{training.injection}/rate-{training.rate:g}/seed-{training.seed}"

    def run(folder: Path, say: Say) -> Result:
        texts = read_texts(work_of(folder, name), training.corpus, training.vocab_size)
        return training.run(folder, texts, say)

    return Cell(name, training.as_json(), run)


class Row(NamedTuple):
    """One injection under one recipe."""

    recipe: Recipe
    kind: InjectionKind
    runs: dict[float, list[Result]]
    """By rate."""

    @property
    def losses(self) -> dict[float, float]:
        """Mean loss over seeds at the rates where every seed stayed finite."""
        return {
            rate: statistics.fmean(run["loss"] for run in runs)
            for rate, runs in self.runs.items()
            if all(run["loss"] is not None for run in runs)
        }

    @property
    def best(self) -> float:
        """The lowest loss over rates; infinite where every rate diverged."""
        return min(self.losses.values(), default=math.inf)

    @property
    def usable(self) -> list[float]:
        """Rates that stayed finite and end within `WITHIN` of the best one."""
        return [rate for rate, loss in self.losses.items() if loss <= self.best + WITHIN]

    @property
    def all_runs(self) -> list[Result]:
        """All runs, whatever their rate."""
        return [run for runs in self.runs.values() for run in runs]

    @property
    def failed(self) -> list[Result]:
        """Runs that were not finite, or ended with nothing learnt but frequencies."""
        return [run for run in self.all_runs if fails(run)]

    @property
    def complete(self) -> bool:
        """Whether every rate has a result."""
        return set(RATES) <= set(self.runs)


Rows = dict[tuple[Recipe, InjectionKind], Row]


def fails(run: Result) -> bool:
    """Return whether a run was not finite, or ended no better than by frequencies of tokens."""
    return run["loss"] is None or run["loss"] >= run["frequencies"]


def rows_of(results: dict[str, Result]) -> Rows:
    """Return the rows that have results, ours first."""
    rows: Rows = {}
    for recipe, kinds in RECIPES.items():
        for kind in kinds:
            runs: dict[float, list[Result]] = {}
            for name, run in results.items():
                if name.startswith(f"{recipe}/{kind}/"):
                    runs.setdefault(run["rate"], []).append(run)
            if runs:
                rows[recipe, kind] = Row(recipe, kind, dict(sorted(runs.items())))
    return rows


def conclude(results: dict[str, Result]) -> Section:
    """Say what the numbers say."""
    rows = rows_of(results)
    untrained = results.get("untrained")
    sentences = [said for recipe in RECIPES for said in _rates(rows, recipe)]
    sentences += _shrunk(rows) + _radii(rows) + _growth(rows, untrained) + _raw(untrained)
    tables = [_losses(rows), _sizes(rows, untrained), _raw_table(untrained)]
    return Section(
        TITLE,
        sentences,
        [made for made in tables if made],
        [*_rate_expectations(rows), *_bounds(rows, untrained)],
        NOTES if results else (),
    )


RECIPE_NOTE = """\
Stress: AdamW at one rate for everything, no clipping, no norms on queries and keys, gradient
through all 8 loops, 400 steps of 8 × 128 tokens (half the batch that would be usual at this width:
more noise, and half the time). Full: the package's recipe, Muon at five times AdamW's rate, with
clipping and those norms. All rows have pre-norm layers, a normed prelude and the same start."""

USABLE_NOTE = f"""\
Losses are nats per held-out token, mean over seeds. A rate is usable where every seed stays finite
and the mean is within {WITHIN} nat of the row's best. In so few steps low rates are not stable but
slow: they miss that bound from below. Frequencies: the loss of knowing only how common tokens
are."""

NOTES = (" ".join(RECIPE_NOTE.split()), " ".join(USABLE_NOTE.split()))


def _listed(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates) or "none"


WORDS: dict[Recipe, str] = {"stress": "Under stress", "full": "Under the package's own recipe"}


def _rates(rows: Rows, recipe: Recipe) -> list[str]:
    """What each row stands, ours first."""
    said: list[str] = []
    for kind, name in KINDS.items():
        if (row := rows.get((recipe, kind))) is None:
            continue
        finite = len(row.losses)
        where = "" if said else WORDS[recipe] + ", "
        tried = f"{len(row.runs)} {'rate' if len(row.runs) == 1 else 'rates'}"
        sentence = f"{where}{name} stays finite at {finite} of {tried}"
        if row.losses:
            sentence += f" and is within {WITHIN} nat of its best at {_listed(row.usable)}"
        steps = [run["diverged_at"] for run in row.all_runs if run["diverged_at"] is not None]
        if steps:
            sentence += f"; it diverges first at step {min(steps)}"
        said.append(sentence + ".")
    return said


def _shrunk(rows: Rows) -> list[str]:
    """What is left of the claim where nothing diverges, and how ours compares where rows stand."""
    said = []
    runs = [run for row in rows.values() for run in row.all_runs]
    failed = [run for run in runs if fails(run)]
    compared = {(recipe, kind) for recipe, kind in rows if kind != OURS}
    if runs and compared and not failed:
        said.append(
            f"At this size nothing diverges: all {len(runs)} trainings, of every injection at "
            "every rate tried, end finite and better than by frequencies of tokens. The claim "
            "that only a radius below 1 survives high rates is not shown here; what is left is "
            "how the losses compare, and the state's bound."
        )
    for recipe in RECIPES:
        ours = rows.get((recipe, OURS))
        gaps = [] if ours is None else worst_gaps(rows, ours)
        if gaps:
            said.append(_comparison(recipe, gaps))
    return said


class Gap(NamedTuple):
    """Our loss minus an alternative's, at the rate where ours fares worst."""

    kind: InjectionKind
    rate: float
    nats: float


def worst_gaps(rows: Rows, ours: Row) -> list[Gap]:
    """Return, for each alternative, where ours compares worst; a diverged alternative is beaten."""
    gaps = []
    for (recipe, kind), row in rows.items():
        if recipe != ours.recipe or kind == OURS:
            continue
        pairs = [
            Gap(kind, rate, ours.losses.get(rate, math.inf) - loss)
            for rate, loss in row.losses.items()
            if rate in ours.runs
        ]
        if pairs:
            gaps.append(max(pairs, key=lambda gap: gap.nats))
    return gaps


def _comparison(recipe: Recipe, gaps: list[Gap]) -> str:
    worse = [gap for gap in gaps if gap.nats > NEVER_WORSE]
    largest = max(gap.nats for gap in gaps)
    if not worse:
        return (
            f"{WORDS[recipe]}, ours is never worse: at every rate its loss is within "
            f"{NEVER_WORSE} nat of each alternative's, or below it (at most {largest:+.3f})."
        )
    cases = [
        f"than {KINDS[gap.kind]} at {gap.rate:g}, "
        + ("where ours diverges" if math.isinf(gap.nats) else f"by {gap.nats:.3f} nats")
        for gap in worse
    ]
    return f"{WORDS[recipe]}, ours is worse {'; and '.join(cases)}."


def _radii(rows: Rows) -> list[str]:
    """The largest spectral radius that was learnt, and whether failing goes with it."""
    learnt = {kind: row for (recipe, kind), row in rows.items() if recipe == "stress"}
    parts = [
        f"{largest_radius(row):.4f} in {KINDS[kind]}"
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


def largest_radius(row: Row) -> float:
    """Return the largest spectral radius at any step of any run; infinite where not finite."""
    found = [run["largest_radius"] for run in row.all_runs]
    return max(math.inf if radius is None else radius for radius in found)


def growth(states: dict[Any, float | None], first: int, last: int) -> float:
    """Return the state's size at `last` loops over that at `first`; infinite where not finite."""
    sizes = {int(loops): size for loops, size in states.items()}
    before, after = sizes[first], sizes[last]
    return math.inf if before is None or after is None else after / before


def _deepest(states: dict[Any, float | None]) -> int:
    return max(map(int, states))


def _trained_growth(row: Row) -> float | None:
    """The worst growth from the trained depth to the deepest, of runs that stayed finite."""
    found = [
        growth(run["states"], run["trained_loops"], _deepest(run["states"]))
        for run in row.all_runs
        if run["states"] is not None
    ]
    return max(found) if found else None


def _growth(rows: Rows, untrained: Result | None) -> list[str]:
    """How the state grows from the trained depth to the deepest."""
    found = {kind: row for (recipe, kind), row in rows.items() if recipe == "stress"}
    parts = [
        f"{KINDS[kind]} {_times(most)}"
        for kind, row in found.items()
        if (most := _trained_growth(row)) is not None
    ]
    said = []
    if parts:
        runs = [run for row in found.values() for run in row.all_runs if run["states"]]
        deepest, trained = _deepest(runs[0]["states"]), runs[0]["trained_loops"]
        said.append(
            f"From {trained} loops to {deepest:,}, the state of models trained under stress grows "
            f"at most by these factors: {', '.join(parts)}."
        )
    if untrained is not None:
        first, deepest = untrained["trained_loops"], _deepest(untrained["states"]["stress/lti"])
        factors = [
            f"{KINDS[kind]} {_times(growth(untrained['states'][f'stress/{kind}'], first, deepest))}"
            for kind in RECIPES["stress"]
        ]
        said.append(f"Untrained, from {first} to {deepest:,}: {', '.join(factors)}.")
    return said


def _times(factor: float) -> str:
    return "without bound" if math.isinf(factor) else f"{factor:.2f}"


def _raw(untrained: Result | None) -> list[str]:
    """Whether A is below 1 in floating point."""
    if untrained is None:
        return []
    ours, paper = untrained["radius"]["ours"], untrained["radius"]["on paper"]
    pairs = ours["fp32"]["pairs"]
    wrong = sum(run["outside"] + run["outside_rounded"] + run["no_number"] for run in ours.values())
    largest = max(run["largest"] for run in ours.values())
    shares = [
        f"{100 * (run['outside'] + run['no_number']) / run['pairs']:.0f} % in {name}"
        for name, run in paper.items()
    ]
    held = f"is at most {largest:.5f} in every dtype" if not wrong else f"fails at {wrong} of them"
    said = (
        f"Without training, for {pairs:,} pairs of raw values from -10,000 to 10,000, A {held}; "
        "exp(-softplus(p) e^q), which is below 1 on paper, rounds to 1 or is no number for "
        f"{', '.join(shares)}."
    )
    return [said]


def _losses(rows: Rows) -> str:
    """Loss of every row at every rate, or where it diverged."""
    if not rows:
        return ""
    rates = sorted({rate for row in rows.values() for rate in row.runs})
    head = ["recipe", "injection", "seeds", *(f"rate {rate:g}" for rate in rates)]
    head += ["largest usable rate", "largest radius", "by frequencies"]
    lines = []
    for row in rows.values():
        frequencies = row.all_runs[0]["frequencies"]
        lines.append(
            [
                row.recipe,
                KINDS[row.kind],
                max(map(len, row.runs.values())),
                *(_outcome(row.runs.get(rate, [])) for rate in rates),
                f"{max(row.usable):g}" if row.usable else "none",
                _number(largest_radius(row), 4),
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
    mark = " (nothing learnt)" if any(map(fails, runs)) else ""
    return f"{statistics.fmean(losses):.3f}{mark}"


def _number(value: float, digits: int) -> str:
    return "not finite" if math.isinf(value) else f"{value:.{digits}f}"


DEPTHS = (1, 8, 64, 512, 1024)


def _sizes(rows: Rows, untrained: Result | None) -> str:
    """The size of the state at some depths, before and after training."""
    lines = []
    for recipe, kinds in RECIPES.items():
        for kind in kinds:
            measured = {} if untrained is None else untrained["states"]
            if states := measured.get(f"{recipe}/{kind}"):
                lines.append([recipe, KINDS[kind], "untrained", *_at_depths([states])])
            if (row := rows.get((recipe, kind))) is not None:
                found = [run["states"] for run in row.all_runs if run["states"] is not None]
                if found:
                    lines.append([recipe, KINDS[kind], "trained", *_at_depths(found)])
    head = ["size of the state (largest of the runs)", "injection", "model"]
    return table([*head, *(f"{n:,} loops" for n in DEPTHS)], lines) if lines else ""


def _at_depths(found: list[dict[Any, float | None]]) -> list[str]:
    cells = []
    for depth in DEPTHS:
        sizes = [{int(n): size for n, size in states.items()}.get(depth, -1.0) for states in found]
        if any(size is None for size in sizes):
            cells.append("not finite")
        else:
            most = max(size for size in sizes if size is not None)
            cells.append("" if most < 0 else f"{most:.3g}")
    return cells


def _raw_table(untrained: Result | None) -> str:
    if untrained is None:
        return ""
    head = ["A at raw values of ±1e4", "dtype", "pairs", "largest", "1 or more, or below 0"]
    head += ["1 after rounding", "no number", "gradients"]
    lines = []
    for form, measured in untrained["radius"].items():
        for name, run in measured.items():
            gradients = ""
            if "dead" in run:
                finite = "finite" if run["gradients_finite"] else "not finite"
                gradients = f"{finite}, {run['dead']} dead in -15 to 8"
            counts = [run["outside"], run["outside_rounded"], run["no_number"]]
            lines.append([form, name, run["pairs"], f"{run['largest']:.5f}", *counts, gradients])
    return table(head, lines)


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
        if others and ours.usable:
            worst = min(max(row.usable, default=0.0) for row in others)
            factor = max(ours.usable) / worst if worst else math.inf
            made.append(
                Expectation(
                    f"{recipe}: largest usable rate over the worst alternative's",
                    "≥ 3",
                    "no rate of that one is usable" if math.isinf(factor) else f"{factor:.1f}",
                    factor >= 3 - 1e-6,
                )
            )
    return made


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
        deepest = _deepest(sizes[0])
        most = max(growth(found, deepest // 2, deepest) for found in sizes)
        made.append(
            Expectation(
                f"ours, {group}: state at {deepest:,} loops over that at {deepest // 2:,}",
                f"≤ {SETTLED}",
                _number(most, 3),
                most <= SETTLED,
            )
        )
    if untrained is not None:
        for name, run in untrained["radius"]["ours"].items():
            wrong = run["outside"] + run["outside_rounded"] + run["no_number"]
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
    from openmythos.training.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, blank, loop_ticks

    figure, (left, middle, right) = blank(
        "Training under stress: no clipping, no norms on queries and keys",
        "learning rate",
        "nats per held-out token",
        columns=3,
    )
    colours = dict(zip(KINDS, (ORANGE, BLUE, GREEN, PURPLE), strict=True))
    rows = {kind: row for (recipe, kind), row in rows_of(results).items() if recipe == "stress"}
    for kind, row in rows.items():
        left.plot(list(row.losses), list(row.losses.values()), "o-", color=colours[kind])
        _draw_states(middle, row, colours[kind])
        fastest = max(row.runs)
        radii = row.runs[fastest][0]["course"]["radius"]
        steps = [STEPS_A_POINT * (n + 1) for n in range(len(radii))]
        values = [math.nan if radius is None else radius for radius in radii]
        right.plot(steps, values, color=colours[kind], label=KINDS[kind])
        right.set_title(f"at rate {fastest:g}", fontsize=10)
    if rows:
        left.set_xscale("log")
        frequencies = next(iter(rows.values())).all_runs[0]["frequencies"]
        left.axhline(frequencies, color=GREY, linestyle=":", label="by frequencies")
        left.legend(frameon=False, fontsize=8)
        loop_ticks(middle, (1, 4, 16, 64, 256, 1024))
        middle.set_yscale("log")
        right.axhline(1, color=GREY, linestyle=":")
        right.legend(frameon=False, fontsize=8)
    middle.set_xlabel("loops of the core")
    middle.set_ylabel("size of the state, trained")
    right.set_xlabel("step")
    right.set_ylabel("spectral radius")
    return figure


def _draw_states(axes: Any, row: Row, colour: str) -> None:
    for run in row.all_runs:
        if run["states"] is not None:
            sizes = {int(n): size for n, size in run["states"].items() if size is not None}
            axes.plot(list(sizes), list(sizes.values()), color=colour, alpha=0.5, linewidth=1)
