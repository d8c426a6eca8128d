"""A token takes different experts at each loop, and it matters which.

A looped language model with routed experts chooses them anew at every loop. On held-out text:
how often two loops choose the same pair for a token, or disjoint ones, beside exact chance, noise
of 1 % on the same state, other tokens of the text, and an untrained network; how the experts are
loaded at each loop; and what it costs to give tokens other experts than their own, which is the
causal test: the first loop's at every loop, their own in another order of loops, another token's,
random ones. Beside it stand a model with a router for each loop, and corrections of the weights by
loop (depth-wise LoRA): none, one that all loops share, one for each loop; all at the trained depth
and at twice that.

What could refute it: choices that chance or noise explains; forced routing that costs nothing; and
a twin whose routers stay at their random start from the first step (only the bias that balances the
load moves): if it reads as well, learning to route adds nothing at this size.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmythos.evidence.cells import Cell, Result, Say
from openmythos.evidence.expert_choice import NOISE, chance, jitter, statistics_of
from openmythos.evidence.forced_routing import DRAWS, FORCED, bootstrap, costs, read, windows_of
from openmythos.evidence.paired import Interval, Runs, common_seeds, rows_of
from openmythos.evidence.report import Expectation, Section, counted, spread, table
from openmythos.evidence.text_training import Texts, TextTraining, read_texts, work_of
from openmythos.model.transformer import OpenMythos

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Routing: which experts each loop takes, and whether it matters"
SEEDS = 2
EXPERTS, CHOSEN, RANK = 8, 2, 8
MODEL = TextTraining(
    shape={
        "prelude_layers": 1,
        "core_layers": 2,
        "coda_layers": 1,
        "mean_loops": 4,
        "experts": EXPERTS,
        "experts_per_token": CHOSEN,
        "shared_experts": 1,
        "expert_size": 128,
    },
    steps=1500,
)
MAIN, FROZEN, OWN = "learned", "frozen-router", "router-per-loop"
CORRECTIONS: dict[str, dict[str, int]] = {
    MAIN: {"lora_rank": 0},
    "lora-shared": {"lora_rank": RANK, "lora_loops": 1},
    "lora-per-loop": {"lora_rank": RANK, "lora_loops": MODEL.config.mean_loops},
}
"""Rows by their depth-wise LoRA."""

ROWS = (MAIN, FROZEN, OWN, *list(CORRECTIONS)[1:])
QUICK: dict[str, Any] = {
    "steps": 100,
    "batch_size": 8,
    "length": 128,
    "corpus": "embedded",
    "vocab_size": 512,
    "measured_tokens": 2048,
}
QUICK_WIDTH = 64
SOME_WINDOWS = 64
"""Windows for what is measured by noise, and for the untrained network."""

COST = 0.02
"""Nats that forcing the first loop's experts should cost."""
VARIATION = 0.3
"""Most that the load may vary over experts: deviation over mean, all loops together."""
IDENTICAL, DISJOINT, SAME_UNDER_NOISE = 0.25, 0.25, 0.9
FORCED_FIRST = next(iter(FORCED))


def trainings(*, quick: bool) -> dict[str, TextTraining]:
    """The rows and how each is trained, but for the seed."""
    model = MODEL
    if quick:
        shape = {**MODEL.shape, "hidden_size": QUICK_WIDTH, "expert_size": QUICK_WIDTH}
        model = dataclasses.replace(MODEL, shape=shape, **QUICK)
    rows: dict[str, dict[str, int]] = {
        name: CORRECTIONS.get(name, CORRECTIONS[MAIN]) for name in ROWS
    }
    rows[OWN] = {**rows[MAIN], "router_loops": MODEL.config.mean_loops}
    return {
        name: dataclasses.replace(model, shape={**model.shape, **changed})
        for name, changed in rows.items()
        if name in (MAIN, FROZEN) or not quick
    }


def cells(*, quick: bool, seeds: int) -> list[Cell]:
    """The trainings, the main ones and their twins first."""
    rows = trainings(quick=quick)
    count = 1 if quick else seeds
    return [_cell(name, row, seed) for name, row in rows.items() for seed in range(count)]


def _cell(name: str, training: TextTraining, seed: int) -> Cell:
    training = dataclasses.replace(training, seed=seed)
    cell = f"{name}/seed-{seed}"
    frozen = ("router",) if name == FROZEN else ()

    def run(folder: Path, say: Say) -> Result:
        texts = read_texts(work_of(folder, cell), training.corpus, training.vocab_size)
        model, took = training.train(folder, texts, say, frozen=frozen)
        return took | measure(model.cpu(), training, texts, say)

    settings = {**training.as_json(), "frozen": list(frozen)}
    settings |= {"noise": NOISE, "draws": DRAWS, "windows": SOME_WINDOWS}
    return Cell(cell, settings, run)


def measure(model: OpenMythos, training: TextTraining, texts: Texts, say: Say) -> Result:
    """Measure the choices, and what forcing them costs, at the trained depth and twice it."""
    trained, experts = training.config.mean_loops, training.config.experts
    windows = windows_of(texts.test, training.length, training.measured_tokens)
    some = windows[:SOME_WINDOWS]
    measured: Result = {"trained_loops": trained, "tokens": windows[:, 1:].numel(), "depths": {}}
    for loops in (trained, 2 * trained):
        say(f"measuring at {loops} loops")
        found = read(model, windows, loops)
        measured["depths"][loops] = {
            "nats": statistics.fmean(found.own),
            "forced": {name: cost._asdict() for name, cost in costs(found).items()},
            "jitter": jitter(model, some[:, :-1], loops),
            **statistics_of(found.choices, experts),
        }
        if loops == trained:
            measured["windows"] = [round(nats, 5) for nats in found.own]
    untrained = OpenMythos(training.config, seed=training.seed).eval()
    measured["untrained"] = {
        "jitter": jitter(untrained, some[:, :-1], trained),
        **statistics_of(read(untrained, some, trained, {}).choices, experts),
    }
    return measured


def in_order(results: dict[str, Result]) -> dict[str, Runs]:
    """Return the rows that have results, by seed, as the tables have them."""
    found = rows_of(results)
    return {name: found[name] for name in ROWS if name in found}


def at(run: Result, factor: int) -> Result:
    """Return what was measured at so many times the trained depth."""
    measured: Result = run["depths"][str(factor * run["trained_loops"])]
    return measured


def conclude(results: dict[str, Result]) -> Section:
    """Say what the numbers say."""
    rows = in_order(results)
    runs = list(rows.get(MAIN, {}).values())
    sentences = _choice(runs) + _causal(runs) + _frozen(rows) + _own(rows) + _corrections(rows)
    tables = [_choices_table(rows), _pairs_table(rows), _forced_table(rows)] if rows else []
    expectations = _expectations(runs) + _frozen_expectation(rows)
    return Section(TITLE, sentences, tables, expectations, _notes(rows))


def _mean(runs: list[Result], *keys: str) -> float:
    """Mean over runs of a figure at the trained depth."""
    return statistics.fmean(_figure(run, *keys) for run in runs)


def _figure(run: Result, *keys: str) -> float:
    found: Any = at(run, 1)
    for key in keys:
        found = found[key]
    return float(found)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _choice(runs: list[Result]) -> list[str]:
    """What two loops share, beside what explains it away."""
    if not runs:
        return []
    expected, seeds = chance(EXPERTS, CHOSEN), counted(len(runs), "seed")
    identical, disjoint = (_mean(runs, "loops", key) for key in ("identical", "disjoint"))
    others = _mean(runs, "other_tokens", "identical")
    before = statistics.fmean(run["untrained"]["loops"]["identical"] for run in runs)
    first = (
        f"On held-out text ({seeds}), two loops choose the same {CHOSEN} of {EXPERTS} "
        f"experts for {_percent(identical)} of tokens and disjoint ones for {_percent(disjoint)}; "
        f"chance would give {_percent(expected.identical)} and {_percent(expected.disjoint)}, and "
        f"an untrained network chooses the same for {_percent(before)}."
    )
    second = (
        f"Moving a state by {_percent(NOISE)} of its length leaves "
        f"{_percent(_mean(runs, 'jitter'))} of choices as they were, and two loops of different "
        f"tokens agree for {_percent(others)}."
    )
    return [first, second, *_kept(runs)]


def _kept(runs: list[Result]) -> list[str]:
    """Whether loops agree more than was hoped for, and which do."""
    most = max(_figure(run, "loops", "identical") for run in runs)
    least = min(_figure(run, "loops", "disjoint") for run in runs)
    if most <= IDENTICAL and least >= DISJOINT:
        return []
    by_pair = {
        pair: _mean(runs, "identical_by_pair", pair) for pair in at(runs[0], 1)["identical_by_pair"]
    }
    low, high = (choose(by_pair, key=lambda pair: by_pair[pair]) for choose in (min, max))
    return [
        (
            f"That is less change than was hoped for: loops {low} agree least, on "
            f"{_percent(by_pair[low])} of tokens, loops {high} most, on {_percent(by_pair[high])}."
        )
    ]


def _cost(run: Result, name: str, factor: int = 1) -> Interval:
    return Interval(**at(run, factor)["forced"][name])


def _causal(runs: list[Result]) -> list[str]:
    """What forced routing costs; of several seeds the one where it costs least."""
    if not runs:
        return []
    least = {
        name: min((_cost(run, name) for run in runs), key=lambda cost: cost.mean) for name in FORCED
    }
    parts = [f"{name} {cost} nats" for name, cost in least.items()]
    said = [
        f"Other experts than its own cost a token, in the seed where least: {', '.join(parts)}."
    ]
    first = least[FORCED_FIRST]
    if first.low <= 0:
        said.append(
            "That of the first loop's experts cannot be told from nothing: which experts a later "
            "loop takes does not matter here."
        )
    elif first.mean < COST:
        said.append(f"That of the first loop's experts is there, but below the {COST} hoped for.")
    return said


def minus_learned(rows: dict[str, Runs], name: str) -> tuple[Interval, list[float]] | None:
    """Return a row's nats over the main one's by windows, mean over seeds, and for each seed."""
    seeds = common_seeds(rows, MAIN, name)
    if not seeds:
        return None
    pairs = [(rows[name][seed]["windows"], rows[MAIN][seed]["windows"]) for seed in seeds]
    by_seed = [[other - learned for other, learned in zip(*pair, strict=True)] for pair in pairs]
    by_window = [statistics.fmean(window) for window in zip(*by_seed, strict=True)]
    return bootstrap(by_window), [statistics.fmean(differences) for differences in by_seed]


UNSETTLED = "by the text's chance, but one training of each does not settle it"


def _learning_helps(gap: Interval, by_seed: list[float]) -> bool:
    """Whether a learned router reads better: by its interval, and with every one of some seeds."""
    return gap.low > 0 and min(by_seed) > 0 and len(by_seed) > 1


def _frozen(rows: dict[str, Runs]) -> list[str]:
    """Whether learning to route is worth anything."""
    if (found := minus_learned(rows, FROZEN)) is None:
        return []
    gap, by_seed = found
    seeds = ", ".join(f"{difference:+.4f}" for difference in by_seed)
    said = f"A twin whose routers stay at their random start costs {gap} nats (by seed: {seeds})"
    if _learning_helps(gap, by_seed):
        return [f"{said}: learning to route is worth that much."]
    if gap.low > 0 and len(by_seed) == 1:
        return [f"{said}: learning to route is worth that much {UNSETTLED}."]
    if min(by_seed) < 0 < max(by_seed):
        return [f"{said}: the seeds disagree, so learning to route adds nothing sure at this size."]
    how = "it reads better" if gap.high < 0 else "that cannot be told from nothing"
    return [f"{said}: {how}, so learning to route adds nothing that shows at this size."]


def _own(rows: dict[str, Runs]) -> list[str]:
    """Whether a router for each loop makes loops differ, and whether that is worth anything."""
    if (found := minus_learned(rows, OWN)) is None:
        return []
    runs, (gap, by_seed) = list(rows[OWN].values()), found
    seeds = counted(len(runs), "seed")
    identical, disjoint = (_mean(runs, "loops", key) for key in ("identical", "disjoint"))
    forced = min((_cost(run, FORCED_FIRST) for run in runs), key=lambda cost: cost.mean)
    worth = "which cannot be told from nothing"
    if gap.high < 0 and max(by_seed) < 0:
        worth = "so loops that differ read better"
    elif gap.low > 0 and min(by_seed) > 0:
        worth = "so loops that differ read worse"
    if len(by_seed) == 1 and (gap.high < 0 or gap.low > 0):
        worth += f" {UNSETTLED}"
    return [
        (
            f"With a router for each loop ({seeds}), two loops choose the same for "
            f"{_percent(identical)} of tokens and disjoint ones for {_percent(disjoint)}, the "
            f"first loop's experts at every loop cost {forced} nats, and the model has {gap} nats "
            f"beside the one with one router for all, {worth}."
        )
    ]


def _corrections(rows: dict[str, Runs]) -> list[str]:
    """Nats of no LoRA, a shared one and one for each loop, at both depths."""
    found = {name: list(rows[name].values()) for name in CORRECTIONS if name in rows}
    if MAIN not in found or len(found) == 1:
        return []
    words = {MAIN: "without", "lora-shared": "with one for all", "lora-per-loop": "with one each"}
    parts = []
    for factor, depth in ((1, "at the trained depth"), (2, "at twice that")):
        nats = [
            f"{statistics.fmean(at(run, factor)['nats'] for run in runs):.4f} {words[name]}"
            for name, runs in found.items()
        ]
        parts.append(f"{depth} {', '.join(nats)}")
    return [f"Corrections of the loops' weights (LoRA of rank {RANK}), nats: {'; '.join(parts)}."]


def _choices_table(rows: dict[str, Runs]) -> str:
    """A line for chance, each row at both depths, and the untrained network."""
    expected = chance(EXPERTS, CHOSEN)
    head = ["model", "loops", "seeds", "parameters", "nats", "identical", "disjoint", "Jaccard"]
    head += ["other tokens identical", "information of loop and expert", "load variation"]
    head += [f"same under {_percent(NOISE)} noise"]
    shares = [*map(_percent, expected[:2]), f"{expected.jaccard:.2f}"]
    lines = [["chance", "", "", "", "", *shares, _percent(expected.identical), "0", "", ""]]
    for name, by_seed in rows.items():
        runs = list(by_seed.values())
        parameters = f"{runs[0]['parameters'] / 1e6:.2f} M"
        for factor in (1, 2):
            found = [at(run, factor) for run in runs]
            loops, nats = factor * runs[0]["trained_loops"], [part["nats"] for part in found]
            start = [name, str(loops), str(len(runs)), parameters, spread(nats, 4)]
            lines.append([*start, *_choice_figures(found)])
    if runs := list(rows.get(MAIN, {}).values()):
        start = ["untrained network", str(runs[0]["trained_loops"]), str(len(runs)), "", ""]
        lines.append([*start, *_choice_figures([run["untrained"] for run in runs])])
    return table(head, lines)


def _choice_figures(found: list[Result]) -> list[str]:
    def over(*keys: str) -> float:
        values: list[Any] = found
        for key in keys:
            values = [value[key] for value in values]
        return statistics.fmean(values)

    return [
        _percent(over("loops", "identical")),
        _percent(over("loops", "disjoint")),
        f"{over('loops', 'jaccard'):.2f}",
        _percent(over("other_tokens", "identical")),
        f"{over('information'):.3f}",
        f"{over('variation'):.2f}",
        _percent(over("jitter")),
    ]


def _pairs_table(rows: dict[str, Runs]) -> str:
    """How often each two loops choose the same, at the trained depth."""
    first = at(next(iter(next(iter(rows.values())).values())), 1)["identical_by_pair"]
    lines = []
    for name, by_seed in rows.items():
        runs = list(by_seed.values())
        shares = [_percent(_mean(runs, "identical_by_pair", pair)) for pair in first]
        lines.append([name, *shares])
    return table(["identical, by pair of loops", *first], lines)


def _forced_table(rows: dict[str, Runs]) -> str:
    """What each forced routing costs each row, a line for each seed and depth."""
    lines = [
        [name, seed, factor * run["trained_loops"], *(_cost(run, f, factor) for f in FORCED)]
        for name, runs in rows.items()
        for seed, run in runs.items()
        for factor in (1, 2)
    ]
    return table(["nats for other experts", "seed", "loops", *FORCED], lines)


def _expectations(runs: list[Result]) -> list[Expectation]:
    """Of the row that learns to route without LoRA; the worst seed counts."""
    if not runs:
        return []
    cost = min((_cost(run, FORCED_FIRST) for run in runs), key=lambda cost: cost.low)
    mean = min(_cost(run, FORCED_FIRST).mean for run in runs)
    worst = max(_figure(run, "variation") for run in runs)
    most = max(_figure(run, "loops", "identical") for run in runs)
    least = min(_figure(run, "loops", "disjoint") for run in runs)
    same = min(_figure(run, "jitter") for run in runs)
    no_less, no_more = Expectation.no_less, Expectation.no_more
    return [
        no_less("nats for the first loop's experts at every loop", COST, mean, 5),
        Expectation("its interval's lower end", "> 0", f"{cost.low:+.4f}", cost.low > 0),
        no_more("load variation", VARIATION, worst, 2),
        no_more("two loops identical", 100 * IDENTICAL, 100 * most, 2, unit=" %"),
        no_less("two loops disjoint", 100 * DISJOINT, 100 * least, 2, unit=" %"),
        no_less("choices that noise leaves", 100 * SAME_UNDER_NOISE, 100 * same, 2, unit=" %"),
    ]


def _frozen_expectation(rows: dict[str, Runs]) -> list[Expectation]:
    if (found := minus_learned(rows, FROZEN)) is None:
        return []
    gap, by_seed = found
    helps = _learning_helps(gap, by_seed)
    open_yet = gap.low > 0 and len(by_seed) == 1
    measured = f"{gap}{', one seed' if len(by_seed) == 1 else ''}"
    return [
        Expectation(
            "nats that a frozen router costs",
            "> 0, every seed",
            measured,
            None if open_yet else helps,
        )
    ]


CHOICES_NOTE = """\
Identical, disjoint and Jaccard are over pairs of loops, layers and tokens. Other tokens: the same
between a loop's choice and another loop's for another token of the text, which is what the loads of
the loops alone would give. Information: the mutual information of loop and expert over the mean of
their entropies. Load variation: deviation over mean of an expert's tokens, all loops together, the
worst layer."""

FORCED_NOTE = """\
Forced routing replaces which experts a token takes; how they are weighed still follows the router's
scores. Intervals (95 %) draw the windows of the test text again; they hold the text's chance, not
that of another training, for which the seeds stand. The frozen router's balancing bias
still moves."""


def _notes(rows: dict[str, Runs]) -> list[str]:
    if not rows:
        return []
    run = next(iter(next(iter(rows.values())).values()))
    windows = f"Measured on {run['tokens']:,} held-out tokens in {len(run['windows'])} windows."
    return [windows, " ".join(CHOICES_NOTE.split()), " ".join(FORCED_NOTE.split())]


def draw_figure(results: dict[str, Result]) -> Figure:
    """Load of each expert at each loop, a panel for each layer, and what forcing costs."""
    from openmythos.training.figures import BLUE, GREY, ORANGE, blank

    runs = in_order(results).get(MAIN, {})
    layers = len(at(next(iter(runs.values())), 1)["load"][0]) if runs else 0
    figure, panels = blank("Experts by loop", "expert", "loop", columns=layers + 1)
    for layer, axes in enumerate(panels[:-1]):
        load = [loop[layer] for loop in at(next(iter(runs.values())), 1)["load"]]
        top = max(2 / EXPERTS, max(map(max, load)))
        image = axes.imshow(load, cmap="viridis", vmin=0, vmax=top, aspect="auto")
        axes.set_xticks(*_from_1(len(load[0])))
        axes.set_yticks(*_from_1(len(load)))
        axes.set_title(
            f"{MAIN}/seed-{next(iter(runs))}: share of the load, layer {layer + 1}", fontsize=10
        )
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, shrink=0.8)
    _draw_costs(panels[-1], runs, (ORANGE, BLUE, GREY))
    return figure


def _from_1(count: int) -> tuple[range, list[str]]:
    """Places, and their names that count from 1."""
    return range(count), [str(place + 1) for place in range(count)]


def _draw_costs(axes: Any, runs: Runs, colours: tuple[str, ...]) -> None:
    """What forcing costs each seed, side by side, with intervals."""
    middle = (len(runs) - 1) / 2
    for number, ((seed, run), colour) in enumerate(zip(runs.items(), colours, strict=False)):
        forced = [_cost(run, name) for name in FORCED]
        places = [n + 0.2 * (number - middle) for n in range(len(forced))]
        means = [cost.mean for cost in forced]
        ends = [[c.mean - c.low for c in forced], [c.high - c.mean for c in forced]]
        axes.errorbar(places, means, ends, fmt="o", color=colour, capsize=4, label=f"seed {seed}")
    axes.set_xticks(range(len(FORCED)), [name.replace(" ", "\n") for name in FORCED], fontsize=8)
    axes.set_xlim(-0.5, len(FORCED) - 0.5)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("whose experts a token is given")
    axes.set_ylabel("cost, nats per token")
    seeds = f"seed {next(iter(runs))}" if len(runs) == 1 else "by seed"
    axes.set_title(f"{seeds}; bars are 95 % intervals", fontsize=10)
    if len(runs) > 1:  # a lone entry would look like one more point
        axes.legend(frameon=False, fontsize=8)
