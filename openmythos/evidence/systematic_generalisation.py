"""Facts seen only alone, never inside a chain, work in chains.

A graph's facts are learnt from single questions; most of them also occur in chains of four hops,
but a fifth never do. Chains of those alone are then asked for: a model that has one look-up for all
hops answers them, one that has learnt the facts anew for each hop cannot (Kohli et al. 2026,
arXiv 2604.07822; Wang et al. 2024, arXiv 2405.15071).

The looped model hands on, from loop to loop, what it would answer, as the expected embedding: what
a loop goes on from is then in the form in which entities enter. The one that hands on its state is
shown beside it.

What could refute it: plain transformers of as many layers as the loop runs, and of as many as it
has, with the same data, at two learning rates, with the same supervision after each layer, and with
the answer handed on between their layers; a layer before the loop, in which facts may hide; pairs
of relations that no training chain had; and facts that are added to the finished model, alone, and
asked for in chains.

The variants are ideas for what makes a model use one look-up, each trained once, on one graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmythos.evidence.cells import Cell, Result, Say, by_number
from openmythos.evidence.fact_training import ADDED, COURSE, FactTraining, lens, right
from openmythos.evidence.paired import first_of, runs_of
from openmythos.evidence.report import (
    Expectation,
    Section,
    counted,
    rounded_down,
    rounded_up,
    spread,
    table,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Systematic generalisation: facts seen alone, used in chains"
SEEDS = 3
MAIN = FactTraining(lone_share=0.4, steps=8000, loops=(1, 8), stairs=True, hands_on="answer")
STATE = dataclasses.replace(MAIN, hands_on="state")
PLAIN_8 = dataclasses.replace(STATE, plain_layers=8, loops=(8, 8), stairs=False)

ON_EVERY_GRAPH = {"looped": MAIN, "looped-state": STATE, "plain-8": PLAIN_8}
ON_ONE_GRAPH = {
    "looped-prelude": dataclasses.replace(MAIN, prelude_layers=1),
    "looped-state-no-injection": dataclasses.replace(STATE, injection="none"),
    "plain-8-answers": dataclasses.replace(MAIN, plain_layers=8),
    "plain-8-stairs": dataclasses.replace(STATE, plain_layers=8),
    "plain-8-lr-0.001": dataclasses.replace(PLAIN_8, adam_lr=1e-3),
    "plain-8-waits": dataclasses.replace(PLAIN_8, waits=True),
    "plain-2": dataclasses.replace(PLAIN_8, plain_layers=2, loops=(2, 2)),
}
VARIANTS = {
    "no-stairs": dataclasses.replace(MAIN, loops=(4, 7), stairs=False),
    "state-and-answer": dataclasses.replace(MAIN, hands_on="both"),
    "state-waits": dataclasses.replace(STATE, waits=True),
    "state-one-layer": dataclasses.replace(STATE, core_layers=1, feed_forward_size=512),
}
QUICK = {
    name: dataclasses.replace(
        training,
        entities=20,
        relations=8,
        later=10,
        hops=3,
        loops=loops,
        hidden_size=48,
        feed_forward_size=96,
        batch_size=64,
        steps=1200,
        adam_lr=3e-3,
        added_steps=60,
        measure_every=200,
        questions=200,
    )
    for name, training, loops in (("looped", MAIN, (1, 5)), ("plain-8", PLAIN_8, (8, 8)))
}

MAINS = ("looped", "looped-state")
"""Rows that the variants vary."""

REACHED = 0.9
"""Share of right answers at which a stage counts as reached."""

STAGES = {
    "facts, alone": ("chained-1", "alone-1"),
    "chains of facts met in chains": ("chained-2", "chained-4"),
    "chains of facts met alone": ("alone-2",),
}


def cells(*, quick: bool, seeds: int) -> list[Cell]:
    """The trainings, the main ones first; a seed is a graph."""
    if quick:
        return [_cell(name, training, 0) for name, training in QUICK.items()]
    grid = [_cell(name, t, seed) for seed in range(seeds) for name, t in ON_EVERY_GRAPH.items()]
    return grid + [_cell(name, t, 0) for name, t in {**ON_ONE_GRAPH, **VARIANTS}.items()]


def _cell(name: str, training: FactTraining, seed: int) -> Cell:
    training = dataclasses.replace(training, seed=seed)
    settings = {**training.as_json(), "course": list(COURSE), "questions_after_adding": list(ADDED)}
    return Cell(f"{name}/graph-{seed}", settings, lambda folder, say: run(training, folder, say))


def run(training: FactTraining, folder: Path, say: Say) -> Result:
    """Train, ask every question, read the states, and add facts."""
    model, took = training.train(folder, say)
    say("measuring")
    task, depth = training.task, training.depth
    depths = range(1, depth + 1 if training.plain_layers else 2 * depth + 1)
    result = took | {
        "alone": task.count("alone"),
        "later": task.count("later"),
        "entities": task.entities,
        "depth": depth,
        "right": right(model, task, training.questions, depths, COURSE),
        "lens": lens(model, task, training.questions, depth),
    }
    for name, rehearse in (("rehearsed", True), ("by themselves", False)):
        say(f"adding {task.count('later')} facts, {name}")
        _, shares = training.add(model, folder / name.replace(" ", "-"), rehearse=rehearse)
        result.setdefault("added", {})[name] = shares
    return result


def conclude(results: dict[str, Result]) -> Section:
    """Say what the numbers say."""
    looped = runs_of(results, "looped")
    state = runs_of(results, "looped-state")
    sentences = _main_sentence(looped, _plain(results)) + _state_sentence(looped, state)
    sentences += _added_sentence(looped)
    expectations = _expectations(looped, state, _plain(results))
    found = [name for name in (*ON_EVERY_GRAPH, *ON_ONE_GRAPH) if runs_of(results, name)]
    tables = [_accuracy(results, found)] if found else []
    if variants := [name for name in VARIANTS if runs_of(results, name)]:
        first = {name: runs[:1] for name in MAINS if (runs := runs_of(results, name))}
        rows = {**first, **{name: runs_of(results, name) for name in variants}}
        tables.append(_table_of("variant", rows))
    if found:
        tables += [_stages(results, found), _lens(results, found), _added(results, found)]
    notes = _notes(next((runs_of(results, name)[0] for name in found), None))
    return Section(TITLE, sentences, tables, expectations, notes)


def _plain(results: dict[str, Result]) -> dict[str, Result]:
    return {cell: run for cell, run in results.items() if cell.startswith("plain-")}


def _share(run: Result, question: str) -> float:
    """Right answers at the depth that was fixed before."""
    return float(run["right"][question][str(run["depth"])])


def _worst(runs: Iterable[Result], question: str) -> float:
    return min(_share(run, question) for run in runs)


def _main_sentence(looped: list[Result], plain: dict[str, Result]) -> list[str]:
    if not looped:
        return []
    graphs = counted(len(looped), "graph")
    two, four = _worst(looped, "alone-2"), _worst(looped, "alone-4")
    says = "works" if two >= REACHED else "works often" if two >= 0.5 else "does not work"
    sentence = (
        f"A fact that was seen alone only {says} in chains: with {looped[0]['alone']} such facts "
        f"on each of {graphs}, the looped model answers chains of two of them with "
        f"{rounded_down(two, 3)} right or more and chains of four with {rounded_down(four, 3)}"
    )
    learnt = [cell for cell, run in plain.items() if _reached(run, ["chained-4"])]
    others = [cell for cell in plain if cell not in learnt]
    if learnt:
        sentence += (
            f"; plain transformers that learn the chains of training {_at_two(plain, learnt)}"
        )
    if others:
        sentence += f"; plain transformers that do not learn these {_at_two(plain, others)}"
    return [sentence + "."]


def _at_two(runs: dict[str, Result], cells: list[str]) -> str:
    """The most that rows have of two hops, after their names."""
    most = max(_share(runs[cell], "alone-2") for cell in cells)
    names = ", ".join(sorted({cell.split("/")[0] for cell in cells}))
    return f"({names}) have {rounded_up(most, 2)} or less at two"


def _state_sentence(looped: list[Result], state: list[Result]) -> list[str]:
    if not looped or not state:
        return []
    two, four = _worst(state, "alone-2"), _worst(state, "alone-4")
    return [
        (
            "Its loops hand on what they would answer, as the expected embedding; with loops that "
            f"hand on their state, as elsewhere in this package, {rounded_down(two, 2)} and "
            f"{rounded_down(four, 2)} or more are right."
        )
    ]


def _added_sentence(looped: list[Result]) -> list[str]:
    if not looped:
        return []
    after = [run["added"]["rehearsed"]["after"] for run in looped]
    alone, second = ([shares[name] for shares in after] for name in ("later-1", "chained-later"))
    sentence = (
        f"Of {looped[0]['later']} facts added to the finished model, each alone, "
        f"{spread(alone, 2)} are known, and {spread(second, 2)} of the chains whose second hop is "
        "one of them are right."
    )
    return [sentence]


WANTED = {
    "alone-2": ("2 hops of facts seen alone", 0.9),
    "alone-4": ("4 hops of these", 0.7),
    "apart-2": ("pairs of relations no training chain had", 0.9),
}


LATER = """\
First asked of `looped-state`, which missed four hops; `looped` was made after that, and is judged
on the same graphs."""


def _expectations(
    looped: list[Result], state: list[Result], plain: dict[str, Result]
) -> list[Expectation]:
    made = []
    for name, runs, later in (("looped", looped, LATER), ("looped-state", state, "")):
        for question, (what, wanted) in WANTED.items() if runs else ():
            share = _worst(runs, question)
            what = f"{name}, {what}, worst graph"
            made.append(Expectation.no_less(what, wanted, share, later=later))
    if looped:
        fewest = min(run["alone"] for run in looped)
        made.append(
            Expectation("facts seen alone, each graph", "≥ 200", str(fewest), fewest >= 200)
        )
        ordered = [_in_order(run) for run in looped]
        made.append(
            Expectation(
                "facts first, then chains, then chains of facts seen alone",
                "on every graph",
                f"on {sum(ordered)} of {len(ordered)}",
                all(ordered),
            )
        )
        ahead = [_bridge_ahead(run) for run in looped]
        made.append(
            Expectation(
                "the bridge can be read a loop or more before the answer",
                "on every graph",
                f"on {sum(ahead)} of {len(ahead)}",
                all(ahead),
            )
        )
    if plain:
        best = max(_share(run, "alone-2") for run in plain.values())
        made.append(Expectation.no_more("best plain transformer run, 2 hops", 0.3, best))
    return made


def _reached(run: Result, questions: Iterable[str]) -> int | None:
    """The first measured step from which all these questions were once answered well."""
    for step, shares in sorted(by_number(run["course"]).items()):
        if all(shares[question] >= REACHED for question in questions):
            return step
    return None


def _in_order(run: Result) -> bool:
    steps = [_reached(run, questions) for questions in STAGES.values()]
    known = [step for step in steps if step is not None]
    return len(known) == len(steps) and steps[0] < steps[2] and known == sorted(known)  # type: ignore[operator]


def _first_loop(shares: list[float]) -> int | None:
    """The first loop, from 1, after which most chains show it."""
    return next((loop for loop, share in enumerate(shares, start=1) if share >= 0.5), None)


def _bridge_ahead(run: Result) -> bool:
    bridge, answer = (_first_loop(run["lens"]["alone"][key]) for key in ("bridge", "answer"))
    return bridge is not None and answer is not None and bridge < answer


HEAD = (
    "facts seen alone, asked alone",
    "4 hops of facts seen in chains",
    "unseen pairs of relations",
    "2 hops of facts seen alone",
    "3 hops",
    "4 hops",
)
ASKED = ("alone-1", "chained-4", "apart-2", "alone-2", "alone-3", "alone-4")


def _accuracy(results: dict[str, Result], found: list[str]) -> str:
    return _table_of("model", {name: runs_of(results, name) for name in found})


def _table_of(what: str, rows: dict[str, list[Result]]) -> str:
    body = [
        [
            name,
            f"{runs[0]['parameters'] / 1e3:.0f} k",
            f"{runs[0]['flops']:.1e}",
            len(runs),
            *(spread([_share(run, question) for run in runs], 2) for question in ASKED),
        ]
        for name, runs in rows.items()
    ]
    return table([what, "parameters", "training FLOPs", "graphs", *HEAD], body)


def _stages(results: dict[str, Result], found: list[str]) -> str:
    rows = []
    for name in found:
        steps = [[_reached(run, q) for run in runs_of(results, name)] for q in STAGES.values()]
        rows.append([name, *(", ".join(map(_or_never, column)) for column in steps)])
    return table([f"step that reaches {REACHED:g}, by graph", *STAGES], rows)


def _or_never(step: int | None) -> str:
    return "never" if step is None else str(step)


def _lens(results: dict[str, Result], found: list[str]) -> str:
    """The first loop after which bridge and answer can be read, graph by graph."""
    head = ["read off the states of 2 hops, first loop or layer, by graph"]
    columns = [(kind, key) for kind in ("chained", "alone") for key in ("bridge", "answer")]
    names = {"chained": "facts seen in chains", "alone": "facts seen alone"}
    rows = []
    for name in found:
        loops = [
            [_first_loop(run["lens"][kind][key]) for run in runs_of(results, name)]
            for kind, key in columns
        ]
        rows.append([name, *(", ".join(map(_or_never, column)) for column in loops)])
    return table([*head, *(f"{names[kind]}: {key}" for kind, key in columns)], rows)


WORDS = {
    "later-1": "new, alone",
    "later-chained": "new, then old",
    "chained-later": "old, then new",
    "chained-2": "old chains",
    "alone-1": "old facts seen alone",
    "alone-2": "their chains",
}


def _added(results: dict[str, Result], found: list[str]) -> str:
    rows = []
    for name in found:
        for how in ("rehearsed", "by themselves"):
            runs = [run["added"][how]["after"] for run in runs_of(results, name)]
            rows.append([name, how, *(spread([run[key] for run in runs], 2) for key in ADDED)])
    return table(["model", "new facts added", *(WORDS[key] for key in ADDED)], rows)


APART = """\
Places, entities and pairs of relations of the held-out chains all occurred in training; only their
facts never stood in a chain. Unseen pairs of relations are asked of facts that did."""

DEPTH = "Every figure is read at the most loops of training, a depth fixed beforehand."

NEW = """\
Rehearsed: the new facts are a quarter of each batch, the old training is the rest. By themselves:
nothing else is trained, and what was known may be lost."""

READABLE = """\
A bridge or an answer counts as readable after the first loop at which half of the chains show
it."""


IDEAS = """\
A loop of `looped` hands on to the next the expected embedding of its answer at each place, one of a
`looped-state` or `state-` row its state, of `state-and-answer` their sum; a layer of
`plain-8-answers` hands on its answer too. Stairs, in all looped rows but no-stairs, and in
plain-8-stairs and plain-8-answers: the answer after n hops is asked for only where at least n loops
or layers run, so that a fact must be known after one. Waits: no-ops stand before or behind the
relation of single facts, which no other fact joins."""


def _notes(run: Result | None) -> list[str]:
    chance = [] if run is None else [f"Chance is {1 / run['entities']:.3f}."]
    return [APART, DEPTH, NEW, READABLE, IDEAS, *chance]


def draw_figure(results: dict[str, Result]) -> Figure:
    """The three stages over training, looped and plain, and what the states say loop by loop."""
    from openmythos.training.figures import blank

    shown = [name for name in ("looped", "looped-state", "plain-8") if runs_of(results, name)]
    columns = max(1, len(shown))
    figure, panels = blank(TITLE, "step of training", "share right", columns, rows=2)
    for axes in panels:
        axes.set_ylim(-0.02, 1.02)
    for number, name in enumerate(shown):
        cell, run = first_of(results, name)
        _draw_course(panels[number], cell, run)
        _draw_lens(panels[columns + number], cell, run)
    if shown:  # the lines are the same in all panels of a row
        for first in (panels[0], panels[columns]):
            first.legend(frameon=False, fontsize=8)
    return figure


def _draw_course(axes: Axes, cell: str, run: Result) -> None:
    from openmythos.training.figures import BLUE, GREEN, GREY, ORANGE, PURPLE

    lines = {
        "alone-1": ("facts seen alone, asked alone", GREY),
        "chained-4": ("4 hops of facts seen in chains", BLUE),
        "apart-2": ("unseen pairs of relations", PURPLE),
        "alone-2": ("2 hops of facts seen alone", ORANGE),
        "alone-4": ("4 hops of these", GREEN),
    }
    course = sorted(by_number(run["course"]).items())
    for question, (label, colour) in lines.items():
        axes.plot(
            [step for step, _ in course],
            [shares[question] for _, shares in course],
            color=colour,
            label=label,
        )
    axes.set_title(cell, fontsize=10)


def _draw_lens(axes: Axes, cell: str, run: Result) -> None:
    from openmythos.training.figures import BLUE, ORANGE

    for kind, style in (("chained", ":"), ("alone", "-")):
        seen = "seen in chains" if kind == "chained" else "seen alone"
        for key, colour in (("bridge", BLUE), ("answer", ORANGE)):
            shares: list[Any] = run["lens"][kind][key]
            loops = range(1, len(shares) + 1)
            axes.plot(loops, shares, style, color=colour, label=f"{key}, facts {seen}")
    axes.set_title(f"{cell}: read off the states of 2 hops", fontsize=10)
    axes.set_xlabel("layer" if cell.startswith("plain") else "loop")
