"""From log-likelihoods of answers to accuracy, perplexity and bits per byte, with their errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from openmythos.inference.language_model import LanguageModel
from openmythos.inference.scoring import Continuation, Score, encode_pairs, score
from openmythos.inference.thinking import Thinking
from openmythos.tasks.question_sets import Comparison, Kind, Question, credit

T = TypeVar("T")

LENGTH: dict[Comparison, Callable[[str], int]] = {
    "raw": lambda _: 1,
    "per_char": lambda answer: max(1, len(answer.removeprefix(" "))),
    "per_byte": lambda answer: max(1, len(answer.removeprefix(" ").encode())),
}
"""What a log-likelihood is divided by before answers are compared; the space that an answer begins
with does not count, as in lm-evaluation-harness (`acc_norm`) and OLMo's evaluations in training."""


@dataclass(frozen=True)
class Figure:
    """A measured value and its standard error over the questions."""

    value: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Grade:
    """How a model does at one depth, or with one rule."""

    loops: int
    """Most loops a token could take."""
    mean_loops: float
    """Loops that the tokens of the answers took."""
    accuracy: dict[Comparison, Figure]
    """Of a `choice`: the right answer is the likeliest, by each comparison. Else, under `raw`: it
    is what greedy decoding gives."""
    perplexity: Figure | None
    """Of the last word; for a `word` alone."""
    bits_per_byte: Figure
    """Bits of all right answers over their bytes, with the spaces that they begin with."""
    mean_bits_per_byte: Figure
    """Mean over the right answers of bits over bytes without that space, as OLMo reports it."""
    cut: int
    """Questions with a context that was cut on the left, to fit into the model's max_length."""


def grade(
    lm: LanguageModel,
    questions: Sequence[Question],
    kind: Kind,
    thinking: Thinking,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Grade:
    """Let a model answer, and say how well.

    Args:
        lm: model and tokenizer.
        questions: two or more.
        kind: the task's.
        thinking: loops, halting rule and threshold. The cache's policy plays no part.
        progress: called after each batch with the answers done and all there are.

    Raises:
        InputError: loops or rule do not fit the model.
    """
    pairs = [pair for q in questions for pair in zip(q.contexts, q.answers, strict=True)]
    answers = encode_pairs(lm.tokenizer, pairs)
    vocab = lm.tokenizer.vocab_size
    scores = score(lm.model, answers, thinking, vocab_size=vocab, progress=progress)
    asked, scored = _by_question(answers, questions), _by_question(scores, questions)
    gold = [row[question.right] for row, question in zip(scored, questions, strict=True)]
    nats = np.array([-one.log_likelihood for one in gold])
    limit, tokens = lm.model.config.max_length, sum(len(one.token_ids) for one in answers)
    return Grade(
        loops=thinking.loops_of(lm.model.config),
        mean_loops=sum(one.loops for one in scores) / tokens,
        accuracy=_choices(questions, scored) if kind == "choice" else {"raw": _greedy(gold)},
        perplexity=_perplexity(nats) if kind == "word" else None,
        bits_per_byte=_ratio(nats / math.log(2), _bytes_coded(lm, questions, asked)),
        mean_bits_per_byte=_mean(nats / math.log(2) / _bytes_written(questions)),
        cut=sum(any(one.cut(limit) for one in row) for row in asked),
    )


def _by_question(items: Sequence[T], questions: Sequence[Question]) -> list[list[T]]:
    """Hand out what was made for all answers in order, question by question."""
    rest = iter(items)
    return [list(islice(rest, len(question.answers))) for question in questions]


def _bytes_coded(
    lm: LanguageModel, questions: Sequence[Question], asked: Sequence[Sequence[Continuation]]
) -> NDArray[np.float64]:
    """Bytes that the right answers' tokens stand for."""
    sizes = lm.tokenizer.token_bytes
    ids = [row[q.right].token_ids for row, q in zip(asked, questions, strict=True)]
    return np.array([float(sizes[list(one)].sum()) for one in ids])


def _bytes_written(questions: Sequence[Question]) -> NDArray[np.float64]:
    return np.array([float(LENGTH["per_byte"](question.gold)) for question in questions])


def _greedy(gold: Sequence[Score]) -> Figure:
    return _mean(np.array([float(one.greedy) for one in gold]))


def _choices(
    questions: Sequence[Question], scored: Sequence[Sequence[Score]]
) -> dict[Comparison, Figure]:
    """Share of the questions whose right answer is the likeliest, by each comparison."""
    figures: dict[Comparison, Figure] = {}
    for comparison, length in LENGTH.items():
        points = []
        for question, row in zip(questions, scored, strict=True):
            pairs = zip(row, question.answers, strict=True)
            values = [one.log_likelihood / length(answer) for one, answer in pairs]
            points.append(credit(values, question.right))
        figures[comparison] = _mean(np.array(points))
    return figures


def _mean(values: NDArray[np.float64]) -> Figure:
    return Figure(float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5))


def _perplexity(nats: NDArray[np.float64]) -> Figure:
    """Exponential of the mean; its error is that of the mean, carried over to first order."""
    mean = _mean(nats)
    value = math.exp(min(mean.value, 700.0))  # the largest that a double can hold
    return Figure(value, value * mean.error)


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> Figure:
    """Sum over sum; its error is that of the mean residual (Cochran 1977, section 6.3)."""
    value = above.sum() / below.sum()
    residual = _mean(above - value * below)
    return Figure(float(value), residual.error / float(below.mean()))
