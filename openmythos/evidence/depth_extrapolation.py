"""Chains deeper than any seen in training are solved by running the core more often.

Looped models learn chains of up to 20 hops and are asked for 20 to 100, at many depths. How many
loops a length needs is read off validation chains (the fewest with 0.995 right, every number tried)
and reported on fresh ones, so that no depth is chosen on the chains it is scored on. Nor was the
rule: its margin was set after a first rule had been seen to miss on fresh chains (the fewest loops
with 0.99 right on 128), so the cores of one layer and of three were trained and scored anew, on
chains that nothing was set on.

Controls that could refute it: chains among as many no-ops at random places, whose length and
positions say nothing about their hops; plain transformers with the same supervision at two
learning rates, tested past their own longest chain; the same core trained at one fixed depth; and
two random first states, which must end in the same answers (path independence, Anil et al. 2022,
arXiv 2211.09961).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openmythos.evidence.cells import Cell, Result, Say, by_number
from openmythos.evidence.hop_training import (
    AFTERWARDS,
    FRESH,
    LOOPS,
    REASONER,
    TASK,
    TRAINED_HOPS,
    VALIDATION,
    HopTraining,
    answers,
    draw,
    measure,
)
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
from openmythos.model.transformer import OpenMythos
from openmythos.tasks.hops import Chains

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Depth extrapolation: 20 hops trained, 100 tested"
SEEDS = 3
HOPS = (20, 25, 30, 40, 60, 100)
SOLVED = 0.99
"""Share of answers right that is wanted of fresh chains."""
ENOUGH = 0.995
"""Share that loops must reach on validation chains: of many numbers of loops, the fewest to reach
0.99 there owe it to luck as often as not."""
NEAR = 0.9
"""Share from which on every number of loops is tried."""
PATHS = 256
"""Fresh chains that are begun from two random first states."""
DRAWN, CHOICE = 128, 512
"""Validation chains that a curve over loops is drawn from, and those that the loops are chosen
on."""

SCORED_ON = {"core-1": AFTERWARDS, "core-3": AFTERWARDS}
"""Stream of the fresh chains of a row; where it is not named here, `FRESH`."""

LOOPED = {
    "core-1": REASONER,
    "core-3": dataclasses.replace(
        REASONER, core_layers=3, loops=(8, 16), steps=3000, muon_lr=0.007, adam_lr=2e-3
    ),
    "core-1-fixed": dataclasses.replace(REASONER, loops=(20, 20)),
}
"""Three layers need a lower rate: at that of one layer the loss stood at 3.3 nats for 500 steps,
the first hop not learnt. Nor may they have too few loops: a model that has learnt two hops a loop
cannot answer 20 hops in 5 loops, and learns from its guesses there (with 5 to 10 loops 0.96 of 20
hops, after 2,000 steps)."""
PLAIN_STEPS = {8: 10_700, 16: 5_350, 24: 3_570}
"""Steps of a plain transformer by its layers: three times the operations of the one-layer core."""
PLAIN_RATES = {8: (0.005, 0.01, 0.02), 16: (0.01, 0.02), 24: (0.005, 0.01)}
"""Muon's rates. Of 0.01 and 0.02 the lower was the better with 8 and 16 layers, so a lower one was
added with 8, and takes the place of the higher with 24."""
PLAIN = {
    f"plain-{layers}-lr-{rate:g}": dataclasses.replace(
        REASONER, plain_layers=layers, muon_lr=rate, steps=PLAIN_STEPS[layers]
    )
    for layers, rates in PLAIN_RATES.items()
    for rate in rates
}
QUICK = {"core-1": dataclasses.replace(REASONER, hidden_size=64, feed_forward_size=512, steps=300)}


def cells(*, quick: bool, seeds: int) -> list[Cell]:
    """The trainings, the main ones first."""
    if quick:
        return [_cell(name, training, seed=0) for name, training in QUICK.items()]
    looped = [_cell(name, t, seed) for seed in range(seeds) for name, t in LOOPED.items()]
    return looped + [_cell(name, training, seed=0) for name, training in PLAIN.items()]


def _cell(name: str, training: HopTraining, seed: int) -> Cell:
    training = dataclasses.replace(training, seed=seed)
    stream = SCORED_ON.get(name, FRESH)

    def run(folder: Path, say: Say) -> Result:
        model, took = training.train(folder, say)
        say("measuring")
        if training.plain_layers:
            return took | _plain(model, training)
        return took | _looped(model, training, stream)

    settings = training.as_json()
    if not training.plain_layers:
        settings |= {"chosen_on": CHOICE, "chosen_at": ENOUGH, "hops": list(HOPS)}
        settings |= {"drawn": DRAWN, "near": NEAR, "measured": list(LOOPS)}
    if stream != FRESH:
        settings["scored_on"] = stream
    return Cell(f"{name}/seed-{seed}", settings, run)


def _looped(model: OpenMythos, training: HopTraining, stream: int) -> Result:
    """Accuracy over loops on validation chains; on fresh ones, at the loops these ask for."""
    curves: dict[int, dict[int, float]] = {}
    choice: dict[int, dict[int, float]] = {}
    needed: dict[int, int | None] = {}
    fresh: dict[int, dict[str, float]] = {}
    seed = training.seed
    for hops in HOPS:
        curves[hops] = measure(model, VALIDATION, hops, LOOPS, seed=seed, count=DRAWN)
        depths = worth_trying(curves[hops])
        tried = measure(model, VALIDATION, hops, depths, seed=seed, count=CHOICE) if depths else {}
        choice[hops] = tried
        needed[hops] = next((n for n, right in tried.items() if right >= ENOUGH), None)
        depth = needed[hops] or _best(tried or curves[hops])
        right = measure(model, stream, hops, (depth, 2 * depth), seed=seed, count=512)
        fresh[hops] = {"loops": depth, "right": right[depth], "right_at_twice": right[2 * depth]}
    no_ops = {}
    for hops in HOPS[:4]:
        depth = int(fresh[hops]["loops"])
        no_ops[hops] = measure(model, stream, hops, (depth,), seed=seed, no_ops=True)[depth]
    depth = int(fresh[TRAINED_HOPS]["loops"])
    return {
        "curves": curves,
        "choice": choice,
        "needed": needed,
        "fresh": fresh,
        "with_no_ops": no_ops,
        "path_independence": _path_independence(model, training, depth),
        "spectral_radius": float(model.core.injection.spectral_radius()),
    }


def worth_trying(curve: dict[int, float]) -> range:
    """Return every number of loops among which the fewest that serve must be, by a curve.

    From where the curve first comes near what is wanted to the second of its depths that reach it,
    as few chains flatter or belittle one; to its end where fewer do.
    """
    depths = list(curve)
    near = [at for at, right in enumerate(curve.values()) if right >= NEAR]
    if not near:
        return range(0)
    enough = [depth for depth, right in curve.items() if right >= ENOUGH]
    first = depths[near[0] - 1] + 1 if near[0] else depths[0]
    return range(first, (enough[1] if len(enough) > 1 else depths[-1]) + 1)


def _best(curve: dict[int, float]) -> int:
    """The fewest loops that no other number beats."""
    return max(curve, key=lambda loops: (curve[loops], -loops))


def _path_independence(model: OpenMythos, training: HopTraining, depth: int) -> Result:
    """From two random first states: how often the answers agree, and how often they are right."""
    chains = draw(FRESH, TRAINED_HOPS, seed=training.seed, count=PATHS)
    wanted = torch.from_numpy(chains.answers)[:, -1]
    given = [answers(model, chains, [depth], h0=_noise(model, chains, n))[depth] for n in (1, 2)]
    return {
        "loops": depth,
        "agree": float((given[0] == given[1]).double().mean()),
        "right": float((given[0] == wanted).double().mean()),
    }


def _noise(model: OpenMythos, chains: Chains, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*chains.token_ids.shape, model.config.hidden_size, generator=generator)


def _plain(model: OpenMythos, training: HopTraining) -> Result:
    """Accuracy of a plain transformer on its own longest chain, and half as long again."""
    right = {
        hops: measure(model, VALIDATION, hops, [1], seed=training.seed)[1]
        for hops in range(2, TRAINED_HOPS + 1)
    }
    longest = max((hops for hops, share in right.items() if share >= 0.95), default=0)
    beyond = round(1.5 * longest)
    share = measure(model, FRESH, beyond, [1], seed=training.seed, count=1024)[1] if longest else 0
    return {"right": right, "longest": longest, "beyond": beyond, "right_beyond": share}


def conclude(results: dict[str, Result]) -> Section:
    """Say what the numbers say."""
    rows, expectations, sentences = [], [], []
    for name in LOOPED:
        runs = runs_of(results, name)
        if not runs:
            continue
        rows.append([name, f"{runs[0]['parameters'] / 1e6:.2f} M", len(runs)])
        rows[-1] += [_fresh(runs, hops) for hops in HOPS]
        rows[-1].append(spread([run["path_independence"]["agree"] for run in runs]))
    for name in ("core-3", "core-1"):
        if runs := runs_of(results, name):
            sentences += _sentences(name, runs)
            expectations += _expectations(name, runs)
    if runs := runs_of(results, "core-1-fixed"):
        sentences += _sentences("core-1-fixed", runs)
    tables = [
        table(["model", "parameters", "seeds", *(f"{h} hops" for h in HOPS), "paths agree"], rows)
    ]
    strewn = [_no_ops_row(name, runs) for name in LOOPED if (runs := runs_of(results, name))]
    if runs := runs_of(results, "core-1"):
        sentences.append(_no_ops_sentence(runs))
    if strewn:
        tables.append(table(["among no-ops", *(f"{hops} hops" for hops in HOPS[:4])], strewn))
    plain = [_plain_row(name, run) for name in PLAIN for run in runs_of(results, name)]
    if plain:
        head = ["plain transformer", "parameters", "longest chain ≥ 0.95", "tested at"]
        tables.append(table([*head, "right there", "training FLOPs"], plain))
        sentences.append(_plain_sentence(results))
    return Section(TITLE, sentences, tables, expectations, NOTES)


CELLS = f"""\
A cell of the first table is the share of 512 fresh chains answered right, and the loops taken:
the fewest with {ENOUGH} right on {CHOICE} other chains (in brackets where no depth reached that:
the best depth). Mean over seeds, and the range."""

POSITIONS = """\
Attention sees relative positions only (rotary), so a longer chain has no position that training
lacked; training packs chains into sequences of 128 tokens, so that they start anywhere. Among
no-ops, at the same loops, a chain has twice as many places, and its length is no clue: 256 of them
for each number of hops, of which up to 40 are asked."""

RULE = """\
A first rule for the loops (0.99 right on 128 chains) missed three of the wishes on fresh chains;
the one here was set then. Therefore `core-1` and `core-3` were trained and scored once more, on
fresh chains that nothing was set on."""

RATES = """\
Plain transformers were tried at two rates of Muon or more, one seed each, with AdamW's as the core
of one layer has it; the core of three layers got lower rates of both, since with that layer's it
did not learn."""

AGREE = f"""\
Paths agree: the share of {PATHS} chains of {TRAINED_HOPS} hops that get the same answer from two
random first states."""

NOTES = (CELLS, POSITIONS, AGREE, RULE, RATES, f"Chance is {1 / TASK.entities:.3f}.")


def _no_ops_row(name: str, runs: list[Result]) -> list[str]:
    return [name, *(spread([run["with_no_ops"][str(h)] for run in runs]) for h in HOPS[:4])]


def _no_ops_sentence(runs: list[Result]) -> str:
    """Say what is left where a chain's length is no clue."""
    shares = {hops: min(run["with_no_ops"][str(hops)] for run in runs) for hops in HOPS[:4]}
    said = ", ".join(f"{rounded_down(share, 3)} of {hops}" for hops, share in shares.items())
    return (
        "Among as many no-ops at random places, where the length of a chain is no clue, and with "
        f"the loops of chains without them, the core of one layer answers {said} hops in the worst "
        "seed."
    )


def _plain_sentence(results: dict[str, Result]) -> str:
    """Say how far plain transformers come, in training and past it."""
    tried = {name: run for name in PLAIN for run in runs_of(results, name)}
    best = max(run["longest"] for run in tried.values())
    beyond = max(run["right_beyond"] for run in tried.values())
    than = ""
    if looped := runs_of(results, "core-1"):
        times = min(run["flops"] for run in tried.values()) / looped[0]["flops"]
        than = f", trained with {times:.1f} times the operations of the core of one layer,"
    return (
        f"Plain transformers ({', '.join(tried)}){than} answer chains of up to {best} hops at 0.95 "
        f"or more, and of half as long again as each one's own best {rounded_up(beyond, 3)} or "
        "less." + _within_training(tried)
    )


def _within_training(plain: dict[str, Result]) -> str:
    """Say where plain transformers are not even asked for more than training had."""
    if max(run["beyond"] for run in plain.values()) > TRAINED_HOPS:
        return ""
    trained = max(run["right"][str(TRAINED_HOPS)] for run in plain.values())
    return (
        f" That still is within training: of its {TRAINED_HOPS} hops they answer "
        f"{rounded_up(trained, 3)} or less, so that they never reach the depth from which to go on."
    )


def _plain_row(name: str, run: Result) -> list[str]:
    return [
        name,
        f"{run['parameters'] / 1e6:.2f} M",
        str(run["longest"]),
        str(run["beyond"]),
        f"{run['right_beyond']:.3f}",
        f"{run['flops']:.1e}",
    ]


def _fresh(runs: list[Result], hops: int) -> str:
    right = [run["fresh"][str(hops)]["right"] for run in runs]
    loops = [run["fresh"][str(hops)]["loops"] for run in runs]
    solved = all(run["needed"][str(hops)] is not None for run in runs)
    depth = "-".join(map(str, sorted({min(loops), max(loops)})))
    return f"{spread(right)} at {depth}" if solved else f"{spread(right)} (at {depth})"


def _sentences(name: str, runs: list[Result]) -> list[str]:
    def rights(hops: int) -> list[float]:
        return [run["fresh"][str(hops)]["right"] for run in runs]

    fixed = f"one layer that always ran {LOOPED['core-1-fixed'].loops[0]} loops in training"
    layers = {"core-1": "one layer", "core-3": "three layers", "core-1-fixed": fixed}[name]
    solved = [hops for hops in HOPS if min(rights(hops)) >= SOLVED]
    if not solved:
        return [f"The core of {layers} does not solve {TRAINED_HOPS} hops at 0.99 in this run."]
    deepest = max(solved)
    loops = [run["fresh"][str(deepest)]["loops"] for run in runs]
    base = [run["fresh"][str(min(solved))]["loops"] for run in runs]
    seeds = counted(len(runs), "seed")
    sentence = (
        f"Trained on chains of at most {TRAINED_HOPS} hops, a looped model with a core of "
        f"{layers} ({seeds}) answers chains of {deepest} hops with "
        f"{rounded_down(min(rights(deepest)), 3)} right or more, with {_between(loops)} "
        f"loops where {min(solved)} hops take {_between(base)}."
    )
    return [sentence]


def _between(numbers: list[int]) -> str:
    """The least and the most, or the one that all are."""
    return " to ".join(map(str, sorted({min(numbers), max(numbers)})))


def _expectations(name: str, runs: list[Result]) -> list[Expectation]:
    def least(hops: int, key: str = "right") -> float:
        return min(run["fresh"][str(hops)][key] for run in runs)

    ratios = [run["fresh"]["30"]["loops"] / run["fresh"]["20"]["loops"] for run in runs]
    rows = [(f"{hops} hops, worst seed", 0.99, least(hops)) for hops in (20, 30)]
    rows += [("40 hops, worst seed", 0.95, least(40)), ("100 hops, worst seed", 0.95, least(100))]
    rows += [("30 hops at twice the loops", 0.95, least(30, "right_at_twice"))]
    made = [Expectation.no_less(f"{name}: {what}", wanted, found) for what, wanted, found in rows]
    loops = Expectation.no_more(f"{name}: loops of 30 hops over 20", 1.6, max(ratios), 2)
    return [*made, loops]


def draw_figure(results: dict[str, Result]) -> Figure:
    """Accuracy of a row's first seed on validation chains by loops, a line for each length."""
    from openmythos.training.figures import blank, loop_ticks

    shown = [name for name in ("core-3", "core-1") if runs_of(results, name)]
    figure, panels = blank(
        "Chains deeper than in training, solved with more loops",
        "loops of the core",
        "share of chains answered right",
        columns=max(1, len(shown)),
    )
    shades = ["#c6d7ea", "#9dbbdc", "#6f9bcb", "#2f6db5", "#d9722e", "#8c3a10"]
    for axes, name in zip(panels, shown, strict=False):
        cell, run = first_of(results, name)
        for hops, colour in zip(HOPS, shades, strict=True):
            curve = by_number(run["curves"][str(hops)])
            axes.plot(list(curve), list(curve.values()), color=colour, label=f"{hops} hops")
        axes.axhline(1 / TASK.entities, color="#8a8f98", linestyle=":", label="chance")
        axes.set_title(f"{cell}, trained to {TRAINED_HOPS} hops", fontsize=10)
        loop_ticks(axes, (1, 2, 4, 8, 16, 32, 64, 128))
    if shown:
        panels[-1].legend(frameon=False, fontsize=8)
    return figure
