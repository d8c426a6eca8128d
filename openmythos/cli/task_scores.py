"""What `openmythos eval --task` measures and prints: scores, their errors, and the floors."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from openmythos.config import HaltingKind
from openmythos.inference.thinking import Thinking
from openmythos.numbers import check_depths
from openmythos.tasks.question_sets import (
    TASKS,
    Comparison,
    Floors,
    Question,
    Task,
    TaskName,
    floors,
    read_task,
)

if TYPE_CHECKING:
    from openmythos.inference.grading import Grade
    from openmythos.inference.language_model import LanguageModel

FEWEST = 30
"""Questions below which a standard error says too little to call a score better than a floor."""

FLOORS = {
    "chance": "chance",
    "most_frequent": "always the most frequent",
    "longest": "always the longest",
    "shortest": "always the shortest",
    "byte_frequencies": "byte frequencies alone",
}


def measure(
    names: Sequence[TaskName],
    model: Path | None,
    *,
    loops: Sequence[int],
    halting: HaltingKind,
    threshold: float | None,
    limit: int | None,
    device: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a report of each task, made for JSON.

    Args:
        names: the tasks.
        model: folder of a model or a run; None: only the floors.
        loops: depths to score at.
        halting: also score with this rule, at up to the deepest of `loops`.
        threshold: the rule's bound; None is its own default.
        limit: questions of each task; None: all.
        device: where the model runs, as torch names it; None: the CPU.

    Raises:
        MythosError: a task cannot be read, or the model or a depth does not fit.
    """
    check_depths(loops)
    questions = {name: read_task(name, limit) for name in names}
    lm = None
    if model is not None:
        from openmythos.inference.language_model import load

        lm = load(model, device=device)
        lm.warn_of_gate(halting)
    ways = [Thinking(loops=depth) for depth in sorted(set(loops))]
    if halting != "none":
        ways.append(Thinking(loops=max(loops), halting=halting, threshold=threshold))
    return (_report(name, questions[name], lm, ways) for name in names)


def _report(
    name: TaskName,
    questions: Sequence[Question],
    lm: LanguageModel | None,
    ways: Sequence[Thinking],
) -> dict[str, Any]:
    task = TASKS[name]
    below = floors(questions, task.kind)
    report: dict[str, Any] = {
        "task": name,
        "source": task.path,
        "kind": task.kind,
        "comparison": task.comparison,
        "questions": len(questions),
        "answers": sum(len(question.answers) for question in questions),
        "floors": {key: value for key, value in asdict(below).items() if value is not None},
    }
    if lm is None:
        return report
    from openmythos.inference.grading import grade

    scores = []
    for way in ways:
        rule = lm.model.rule(way.halting, way.threshold)
        with _bar(f"{name}, {way.loops} loops") as progress:
            result = grade(lm, questions, task.kind, way, progress=progress)
        scores.append(
            {
                "halting": way.halting,
                "threshold": None if rule is None else rule.threshold,
                **asdict(result),
                "above": _above(result, task, below, len(questions)),
            }
        )
    return report | {"cut": scores[0]["cut"], "scores": scores}


def _above(result: Grade, task: Task, below: Floors, questions: int) -> bool | None:
    """Whether a score is better than every floor, by two standard errors; None: too few questions.

    Of answers that are all right the estimated error is 0. A model that is no better than a floor
    has that of the floor, so an accuracy's error counts as that at least.
    """
    if questions < FEWEST:
        return None
    if task.kind == "text":
        bits = result.bits_per_byte
        return bits.value + 2 * bits.error < below.byte_frequencies
    figure = result.accuracy[task.comparison]
    errors = {
        floor: max(figure.error, math.sqrt(max(0.0, floor * (1 - floor)) / questions))
        for floor in below.accuracy.values()  # a sum, which may be 1 and a rounding
    }
    return all(figure.value - 2 * error > floor for floor, error in errors.items())


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far a measurement is, on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    hidden = not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task(label)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def page(report: dict[str, Any]) -> str:
    """Lay a report out for people."""
    columns = _columns(report)
    rows = [["", *columns]]
    rows += [
        [_way(score), *(_cell(read(score)) for read in columns.values())]
        for score in report.get("scores", [])
    ]
    for key, floor in report["floors"].items():
        column = "bits per byte" if key == "byte_frequencies" else next(iter(columns))
        rows.append([FLOORS[key], *(f"{floor:.4f}" * (name == column) for name in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{report['task']}: {report['questions']:,} questions ({report['source']})", ""]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return "\n".join([*lines, *_remarks(report)])


def _columns(report: dict[str, Any]) -> dict[str, Callable[[dict[str, Any]], dict[str, float]]]:
    """What a score shows, and where it stands; the comparison that is usual for the task first."""
    columns: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {}
    if report["kind"] == "choice":
        others = [name for name in get_args(Comparison) if name != report["comparison"]]
        for name in [report["comparison"], *others]:
            label = name.replace("_", " ")
            columns[label if columns else f"accuracy, {label}"] = partial(_accuracy, name)
    elif report["kind"] == "word":
        columns = {"accuracy": partial(_accuracy, "raw"), "perplexity": itemgetter("perplexity")}
    else:
        columns["word for word"] = partial(_accuracy, "raw")
    return columns | {"bits per byte": itemgetter("bits_per_byte")}


def _accuracy(comparison: str, score: dict[str, Any]) -> dict[str, float]:
    return score["accuracy"][comparison]


def _cell(figure: dict[str, float]) -> str:
    value, error = figure["value"], figure["error"]
    if value >= 1000:
        return f"{value:.4g} ± {error:.2g}"
    return f"{value:.4f} ± {error:.4f}"


def _way(score: dict[str, Any]) -> str:
    if score["halting"] == "none":
        return f"{score['loops']} loops"
    return f"{score['halting']} {score['threshold']:g}, {score['mean_loops']:.2f} loops"


def _remarks(report: dict[str, Any]) -> list[str]:
    if "scores" not in report:
        return []
    lines = ["", _verdict(report)]
    if report["cut"]:
        lines.append(f"cut on the left to fit the model: {report['cut']:,} questions")
    return lines


def _verdict(report: dict[str, Any]) -> str:
    if report["questions"] < FEWEST:
        return (
            f"{report['questions']} questions are too few to call a score better than a floor: it "
            f"takes {FEWEST}"
        )
    best = [_way(score) for score in report["scores"] if score["above"]]
    where = f"at {'; '.join(best)}" if best else "at no depth"
    return f"better than every floor by two standard errors: {where}"
