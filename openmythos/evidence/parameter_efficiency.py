"""A looped model against plain ones of 1.0, 1.3, 1.69 and 2 times its parameters, on real text.

Same text, tokens, order, tokenizer, optimizers and schedule; dense on both sides. A plain model's
layers have about the looped model's width inside, and that width makes its parameters exactly the
ratio's, embedding included. The learning rates of the rows with all seeds are chosen among `RATES`
by whole trainings of seed 0, on held-out documents that are not the test text; the others take the
rate of the row they stand nearest to. The looped model is read at the mean loops of its training:
no depth is chosen. Of several looped shapes that were tried, all are in the table, and the
documents for choosing decide which one is compared; see `headline`.

What could refute it: the plain model of the looped one's parameters trained for longer, with as
many operations as the dearest of the looped rows with all seeds (iso-FLOP), which shows whether
loops are just more computation; larger plain models at equal tokens; and, for reasoning, plain
models of 1.69 and 5 times the parameters on chains of 20 hops.

Trainings may run side by side in several processes, by `--only`; then run `--only tune` first.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openmythos.evidence import reasoning_leg
from openmythos.evidence.cells import Cell, Result, Say, run_cells
from openmythos.evidence.efficiency_rows import (
    ISO_FLOP,
    MAIN,
    RATES,
    RATIOS,
    SEEDED,
    TEXT_ROWS,
    TUNED_AS,
    trainings,
)
from openmythos.evidence.paired import Runs, common_seeds, difference, mean, rows_of
from openmythos.evidence.report import (
    Expectation,
    Section,
    counted,
    rounded_down,
    rounded_up,
    spread,
    table,
)
from openmythos.evidence.text_training import TextTraining, read_texts, work_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Parameter efficiency: one looped model against plain ones of up to twice its size"
SEEDS = 3


def cells(*, quick: bool, seeds: int) -> list[Cell]:
    """The trainings, the main ones first, and the tuning that they rest on."""
    rates = (1.0,) if quick else RATES
    rows = trainings(quick=quick)
    seeded = [name for name in SEEDED if name in rows]
    grid = [(name, seed) for seed in range(1 if quick else seeds) for name in seeded]
    grid += [(name, 0) for name in rows if name not in seeded]
    made = [_cell(name, rows, seed, rates) for name, seed in grid]
    if not quick:
        made += reasoning_leg.cells()
        made += [cell for name in seeded for cell in _tuning(name, rows[name], rates)]
    return made


def _cell(name: str, rows: Mapping[str, TextTraining], seed: int, rates: Sequence[float]) -> Cell:
    """One training at its rate; of seed 0 it may be one of those that chose the rate."""
    training = dataclasses.replace(rows[name], seed=seed)
    tuned_as = name if name in SEEDED else TUNED_AS.get(name, MAIN)
    cell = f"{name}/seed-{seed}"

    def run(folder: Path, say: Say) -> Result:
        work = work_of(folder, cell)
        tuned = run_cells(_tuning(tuned_as, rows[tuned_as], rates), work, say)
        rate = _best_rate(tuned, rates)
        if tuned and name == tuned_as and seed == 0:
            best = next(result for result in tuned.values() if result["rate"] == rate)
            return {key: value for key, value in best.items() if key != "settings"}
        return _measured(dataclasses.replace(training, rate=rate), work, folder, say)

    settings = {**training.as_json(), "rate": list(rates), "tuned_as": tuned_as}
    return Cell(cell, settings, run)


def _tuning(name: str, training: TextTraining, rates: Sequence[float]) -> list[Cell]:
    """Trainings of seed 0, one for each rate; none where there is nothing to choose."""

    def cell(rate: float) -> Cell:
        tried = dataclasses.replace(training, rate=rate, seed=0)
        called = f"tune/{name}/rate-{rate:g}"
        return Cell(
            called,
            tried.as_json(),
            lambda folder, say: _measured(tried, work_of(folder, called), folder, say),
        )

    return [cell(rate) for rate in rates] if len(rates) > 1 else []


def _measured(training: TextTraining, work: Path, folder: Path, say: Say) -> Result:
    """Train, and read the held-out documents."""
    texts = read_texts(work, training.corpus, training.vocab_size)
    model, took = training.train(folder, texts, say)
    say("measuring")
    depth = training.config.mean_loops
    depths = sorted({1, 2, depth, 2 * depth})
    curve = training.measure(model, texts.choice, texts.tokenizer, depths)
    test = training.measure(model, texts.test, texts.tokenizer, [depth])
    rated = {"rate": training.rate, "curve": curve, "choice": curve[depth], "test": test[depth]}
    return took | rated


def _best_rate(tuned: dict[str, Result], rates: Sequence[float]) -> float:
    if not tuned:
        return rates[0]
    best = min(tuned.values(), key=lambda result: (result["choice"], result["rate"]))
    return float(best["rate"])


def share_of_gap(small: float, looped: float, large: float) -> float:
    """Return the share of the gap between two plain models that the looped one closes.

    (small - looped) / (small - large), in bits per byte of the test text, where `small` is the
    plain model of the looped one's own parameters and `large` the one of 1.69 times as many:
    0 is no better than its parameter-twin, 1 as good as the larger model. For several seeds each
    is the mean over the seeds that all three have. NaN where the larger model is no better.
    """
    return (small - looped) / (small - large) if small > large else math.nan


def headline(rows: dict[str, Runs]) -> str | None:
    """Return the looped row that is compared; None where there is none.

    Of those with most seeds it is the one with the fewest bits per byte on the documents for
    choosing. The test text decides nothing.
    """
    tried = {name: runs for name, runs in rows.items() if name.startswith("looped-")}
    if not tried:
        return None
    return min(tried, key=lambda name: (-len(tried[name]), mean(tried[name], "choice")))


def shares(rows: dict[str, Runs], name: str) -> tuple[float, list[float]] | None:
    """Return the share of the gap that a row closes, over all seeds and for each of them."""
    needed = ("plain-1.0x", name, "plain-1.69x")
    bits = [[rows[key][seed]["test"] for key in needed] for seed in common_seeds(rows, *needed)]
    if not bits:
        return None
    means = [statistics.fmean(column) for column in zip(*bits, strict=True)]
    return share_of_gap(*means), [share_of_gap(*row) for row in bits]


def conclude(results: dict[str, Result]) -> Section:
    """Say what the numbers say."""
    rows = rows_of(results, TEXT_ROWS)
    name = headline(rows)
    tables = [_costs(rows, name), _like_for_like(rows, name), _tuning_table(results)]
    tables = [made for made in tables if made] + reasoning_leg.tables(results)
    sentences = [] if name is None else _sentences(rows, name)
    expectations = [] if name is None else _expectations(rows, name)
    return Section(
        TITLE,
        sentences + reasoning_leg.sentences(results),
        tables,
        expectations + reasoning_leg.expectations(results),
        [*_notes(results), published()],
    )


def _costs(rows: dict[str, Runs], name: str | None) -> str:
    """A row's size, quality and costs."""
    if not rows:
        return ""
    base = None if name is None else next(iter(rows[name].values()))
    head = ["model", "parameters", "without embedding", "ratio", "seeds", "bits per byte"]
    head += ["tokens", "training FLOPs", "FLOPs a token", "cache bytes a token"]
    lines = []
    for key, runs in sorted(rows.items()):
        run = next(iter(runs.values()))
        ratio = "" if base is None else f"{run['parameters'] / base['parameters']:.2f}"
        cache = run["cache_bytes"]
        lines.append(
            [
                key,
                f"{run['parameters'] / 1e6:.2f} M",
                f"{run['without_embedding'] / 1e6:.2f} M",
                ratio,
                len(runs),
                spread([run["test"] for run in runs.values()], 4),
                f"{run['tokens'] / 1e6:.1f} M",
                f"{run['flops']:.1e}",
                f"{run['flops_per_token']:.1e}",
                f"{cache['per_loop']:,}",
            ]
        )
    return table(head, lines)


COLUMNS = {
    "iso-parameter (1.0×)": "plain-1.0x",
    "1.0×, longer": ISO_FLOP,
    "iso-token, 1.3×": "plain-1.3x",
    "iso-token, 1.69×": "plain-1.69x",
    "iso-token, 2×": "plain-2x",
}


def _like_for_like(rows: dict[str, Runs], main: str | None) -> str:
    """Each looped row minus each plain one, and the share of the gap closed.

    A row of fewer seeds than the compared one stands beside what that has in the same seeds, since
    these differ from each other as much as the shapes do.
    """
    lines = []
    for name in sorted(rows):
        if name.startswith("looped-"):
            pairs = [difference(rows, name, other, "test") for other in COLUMNS.values()]
            said = ["" if pair is None else str(pair) for pair in pairs]
            closed = [_closed_in_words(rows, name), _closed_there(rows, name, main)]
            lines.append([name, *said, _times_own(rows, name), *closed])
    head = ["looped minus plain", *COLUMNS, "operations, longer over own", "gap closed"]
    head.append(f"{main} in the same seeds")
    return table(head, lines) if lines else ""


def _times_own(rows: dict[str, Runs], name: str) -> str:
    """How many times a row's operations the plain model that was trained for longer took."""
    if ISO_FLOP not in rows:
        return ""
    own, other = (next(iter(rows[key].values()))["flops"] for key in (name, ISO_FLOP))
    return f"{other / own:.2f}"


def _closed_in_words(rows: dict[str, Runs], name: str) -> str:
    """The share of the gap that a row closes, and of how many seeds where that is one."""
    closed = shares(rows, name)
    if closed is None or math.isnan(closed[0]):
        return ""
    return f"{100 * closed[0]:.0f} %{' (one seed)' if len(closed[1]) == 1 else ''}"


def _closed_there(rows: dict[str, Runs], name: str, main: str | None) -> str:
    """The share that the compared row closes in another row's seeds, where they differ."""
    if main is None or rows[name].keys() == rows[main].keys():
        return ""
    same = {seed: run for seed, run in rows[main].items() if seed in rows[name]}
    return _closed_in_words({**rows, main: same}, main)


def _tuning_table(results: dict[str, Result]) -> str:
    """Bits per byte at each rate, on the documents for choosing."""
    found: dict[str, dict[float, float]] = {}
    for cell, result in results.items():
        if cell.startswith("tune/"):
            found.setdefault(cell.split("/")[1], {})[result["rate"]] = result["choice"]
    lines = [
        [name, *(f"{bits[rate]:.4f}" if rate in bits else "" for rate in RATES)]
        for name, bits in sorted(found.items())
    ]
    head = ["tuning: rate ×", *(f"{rate:g}" for rate in RATES)]
    return table(head, lines) if lines else ""


def _sentences(rows: dict[str, Runs], name: str) -> list[str]:
    runs = rows[name]
    size = next(iter(runs.values()))["parameters"] / 1e6
    seeds = counted(len(runs), "seed")
    main = (
        f"On messages of presidents that were held out, a looped model of {size:.2f} M parameters "
        f"({name.removeprefix('looped-')} layers, {seeds}) has {mean(runs, 'test'):.4f} bits per "
        "byte."
    )
    said = [main, *_gap_sentence(rows, name)]
    against = {
        "plain-1.69x": "the plain one of 1.69 times its parameters",
        "plain-2x": "the one of twice its parameters",
    }
    if ISO_FLOP in rows:
        against[ISO_FLOP] = _longer(rows, name)
    for other, words in against.items():
        if (gap := difference(rows, name, other, "test")) is not None:
            said.append(f"Against {words}: {gap} bits per byte, {gap.verdict}.")
    said += _price(rows, name)
    better = [
        key
        for key, tried in rows.items()
        if key.startswith("looped-")
        and (gap := difference({key: tried, name: runs}, key, name, "choice")) is not None
        and gap.mean < 0
    ]
    if better:
        which = f"{' and '.join(sorted(better))} {'have' if len(better) > 1 else 'has'}"
        said.append(
            f"Of the shapes tried with fewer seeds, {which} fewer bits "
            "on the documents for choosing."
        )
    return said


def _longer(rows: dict[str, Runs], name: str) -> str:
    """The plain model that was trained longer, in words."""
    own, other = (next(iter(rows[key].values())) for key in (name, ISO_FLOP))
    operations, tokens = (other[key] / own[key] for key in ("flops", "tokens"))
    return (
        f"its parameter-twin, trained with {operations:.1f} times its operations, on {tokens:.1f} "
        "times its tokens"
    )


def _gap_sentence(rows: dict[str, Runs], name: str) -> list[str]:
    closed = shares(rows, name)
    if closed is None:
        return []
    share, each = closed
    if math.isnan(share):
        return ["The plain model of 1.69 times its parameters is no better than that of 1.0 times."]
    by_seed = ""
    if len(each) > 1 and all(map(math.isfinite, each)):
        least, most = rounded_down(100 * min(each), 0), rounded_up(100 * max(each), 0)
        by_seed = f" ({least} to {most} % by seed)"
    ends = ("plain-1.0x", "plain-1.69x")
    seeds = common_seeds(rows, name, *ends)
    small, large = (statistics.fmean(rows[key][seed]["test"] for seed in seeds) for key in ends)
    between = (
        f"plain transformers of 1.0 and of 1.69 times its parameters, which have {small:.4f} and "
        f"{large:.4f}"
    )
    if share < 0:
        return [f"It is worse than its parameter-twin, and closes nothing of the gap of {between}."]
    return [f"It closes {100 * share:.0f} %{by_seed} of the gap between {between}."]


def _price(rows: dict[str, Runs], name: str) -> list[str]:
    """What the smaller model costs where it runs."""
    if "plain-1.69x" not in rows:
        return []
    own, other = (next(iter(rows[key].values())) for key in (name, "plain-1.69x"))
    flops = own["flops_per_token"] / other["flops_per_token"]
    cache = own["cache_bytes"]["per_loop"] / other["cache_bytes"]["per_loop"]
    sentence = (
        f"Its weights are smaller, its work is not: a token takes {flops:.2f} times the operations "
        f"and {cache:.2f} times the cache of the plain model of 1.69 times its parameters."
    )
    return [sentence]


def _expectations(rows: dict[str, Runs], name: str) -> list[Expectation]:
    made = []
    if (closed := shares(rows, name)) is not None:
        share, what, wanted = closed[0], "share of the gap closed", "≥ 100 %"
        found = "no gap" if math.isnan(share) else f"{rounded_down(100 * share, 1)} %"
        made.append(Expectation(what, wanted, found, share >= 1, WIDER))
    if (gap := difference(rows, name, "plain-1.69x", "test")) is not None:
        high = "one seed" if math.isinf(gap.high) else f"{gap.high:+.4f}"
        made += [
            Expectation.no_more(
                "looped minus plain-1.69x", 0, gap.mean, 4, signed=True, later=WIDER
            ),
            Expectation(
                "its interval's upper end",
                "≤ 0",
                high,
                None if math.isinf(gap.high) else gap.high <= 0,
                WIDER,
            ),
        ]
    if (gap := difference(rows, name, "plain-2x", "test")) is not None:
        what = "goal: looped minus plain-2x"
        made.append(Expectation.no_more(what, 0, gap.mean, 4, signed=True, later=WIDER))
    return made


WIDER = """\
The same wishes had been missed by a model of width 128 with 2,048 tokens of vocabulary, which
closed 10 % of the gap; then the models became wider and other shapes were tried."""

METHOD = """\
Bits per byte on the held-out documents of odd number, with the lowest and highest of the seeds;
differences are paired by seed (same order of text), with 95 % intervals of Student's t, which hold
the chance of seeds and not that of the text. The
documents of even number chose rates and shape. Parameters count the embedding once, which is the
head too; plain models have the ratio's by the width of their feed-forwards."""

GAP = """\
Gap closed: (plain 1.0× − looped) / (plain 1.0× − plain 1.69×), each the mean over the seeds that
all three have. 0 % is no better than the plain model of its own parameters, 100 % as good as the
larger one."""


NAMES = """\
`looped-1+2x6+1` has one layer in the prelude, a core of two that runs six loops, and one layer in
the coda. `-wide` is 256 wide, the others 192; `-fixed` always ran its mean loops in training, the
others one fewer or one more too; `-lora` has corrections of the weights for each loop, of rank 4,
and narrower feed-forwards; `-norm` hands the normed state to the coda, the others a linear map of
it; `-add` injects by h + e; `-peri` norms what a layer adds, not only what it reads; `-lanes` has
two lanes of the state (hyper-connections). `plain-1.69x` is a plain transformer of 1.69 times the
parameters of `looped-1+2x6+1`; `-iso-flop` was trained with as many operations as the dearest of
the looped rows with all seeds. "Rate ×" is what the default learning rates were multiplied by; that
table has bits per byte on the documents for choosing."""


def _notes(results: dict[str, Result]) -> list[str]:
    notes = [" ".join(text.split()) for text in (NAMES, METHOD, GAP)]
    edges = []
    for name, runs in rows_of(results, TEXT_ROWS).items():
        rates = {run["rate"] for run in runs.values()}
        if rates & {min(RATES), max(RATES)}:
            edges.append(name)
    if edges:
        notes.append(
            f"The best rate tried was the lowest or highest for {', '.join(edges)}: a rate beyond "
            "may be better."
        )
    return notes


PUBLISHED = {
    "plain 770 M": {"core": 22.42, "perplexity": 13.08},
    "looped 770 M": {"core": 25.07, "perplexity": 12.49},
    "plain 1.3 B": {"core": 25.45, "perplexity": 11.95},
}
"""Parcae's table (arXiv 2604.12946): mean of the CORE tasks, and validation perplexity."""


def published() -> str:
    """Say what the published "770 M looped is as good as 1.3 B plain" is."""
    small, own, large = PUBLISHED.values()
    core = share_of_gap(*(-row["core"] for row in (small, own, large)))  # more is better
    loss = share_of_gap(*(math.log(row["perplexity"]) for row in (small, own, large)))
    return (
        "The published claim, a looped model of 770 M parameters as good as a plain one of 1.3 B "
        f"(arXiv 2604.12946), is one of CORE, a mean over tasks: {own['core']} against "
        f"{large['core']}, {100 * core:.0f} % of the gap from the plain {small['core']}. In "
        f"perplexity ({own['perplexity']}, between {small['perplexity']} and "
        f"{large['perplexity']}) the same models close {100 * loss:.0f} % of the gap in nats. Bits "
        "per byte, as here, are the harder measure; and here all models see the same tokens, where "
        "their 770 M saw 61.6 B and their 1.3 B saw 104 B."
    )


def draw_figure(results: dict[str, Result]) -> Figure:
    """Bits per byte against parameters, and against the operations of training.

    Looped shapes that are not the compared one are small points without a name.
    """
    from openmythos.training.figures import ORANGE, blank

    figure, panels = blank(
        "A looped model against plain ones", "parameters, millions", "bits per byte", columns=2
    )
    panels[1].set_xlabel("training operations, 10¹²")
    rows = rows_of(results, TEXT_ROWS)
    for axes, key, unit in zip(panels, ("parameters", "flops"), (1e6, 1e12), strict=True):
        _draw_rows(axes, rows, key, unit)
    if rows:
        panels[0].plot([], [], ".", color=ORANGE, alpha=0.4, label="other looped shapes")
        panels[0].legend(frameon=False, fontsize=8)
    return figure


def _draw_rows(axes: Axes, rows: dict[str, Runs], key: str, unit: float) -> None:
    """A point for each training, and a line through the plain models of one length of training."""
    from openmythos.training.figures import BLUE, ORANGE

    main = headline(rows)
    for name, runs in sorted(rows.items()):
        looped = name.startswith("looped-")
        colour = ORANGE if looped else BLUE
        at = [run[key] / unit for run in runs.values()]
        bits = [run["test"] for run in runs.values()]
        if looped and name != main:  # too many to name each
            axes.plot(at, bits, ".", color=colour, alpha=0.4, markersize=4)
            continue
        axes.plot(at, bits, "o", color=colour, alpha=0.6, markersize=5)
        below = {"xytext": (0, -13), "ha": "center"}  # where the plain models' line is not
        axes.annotate(
            name,
            (at[0], min(bits) if looped else statistics.fmean(bits)),
            fontsize=7,
            textcoords="offset points",
            color=colour,
            **(below if looped else {"xytext": (6, 4)}),
        )
    axes.margins(x=0.2)  # room for the names
    line = sorted(
        (next(iter(rows[name].values()))[key] / unit, mean(rows[name], "test"))
        for name in RATIOS
        if name in rows
    )
    axes.plot([at for at, _ in line], [bits for _, bits in line], color=BLUE, linewidth=1)
