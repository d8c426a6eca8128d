"""Bits per byte of a text at several depths, from one run of the core, or with a halting rule.

They depend on how long the windows are: figures compare where a text is read in the same `Reading`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from openmythos.config import HaltingKind
from openmythos.errors import InputError
from openmythos.model.transformer import OpenMythos, cross_entropy
from openmythos.numbers import check_depths
from openmythos.training.token_file import TokenFile, write_tokens
from openmythos.training.tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """Quality on one file of tokens."""

    loops: tuple[int, ...]
    bits_per_byte: tuple[float, ...]
    """One for each of `loops`."""
    tokens: int
    bytes: int


@dataclass(frozen=True)
class HaltingEvaluation:
    """Quality on one file of tokens where a rule decides when each token leaves the core."""

    halting: HaltingKind
    threshold: float | None
    """The rule's bound, its own default where none was asked for; None where there is no rule."""
    budget: int
    """The most loops a token could take."""
    mean_loops: float
    bits_per_byte: float
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Reading:
    """In which windows a text is read; figures compare where this is the same."""

    length: int
    """Tokens in a window."""
    stride: int
    """Tokens from one window to the next."""
    max_tokens: int | None = None
    """Tokens measured from the start, and the rest of the window that they begin; None: all."""

    @classmethod
    def of(cls, length: int, max_tokens: int | None = None) -> Reading:
        """Return windows of so many tokens, half of that apart."""
        return cls(length=length, stride=max(1, length // 2), max_tokens=max_tokens)

    @classmethod
    def usual(
        cls,
        trained: int | None,
        max_length: int,
        *,
        length: int | None = None,
        stride: int | None = None,
        max_tokens: int | None = None,
    ) -> Reading:
        """Fill in what is None: windows as in training, else of max_length, half of that apart."""
        if length is None:
            length = max_length if trained is None else trained
        reading = cls.of(length, max_tokens)
        return reading if stride is None else dataclasses.replace(reading, stride=stride)

    @property
    def enough(self) -> int | None:
        """Tokens of a text that hold every window; None: all are needed."""
        # The last window that counts may end nearly a length after the last token asked for.
        return None if self.max_tokens is None else self.max_tokens + self.length

    def __str__(self) -> str:
        first = "" if self.max_tokens is None else f", for the first {self.max_tokens:,} tokens"
        return f"windows of {self.length:,} tokens, {self.stride:,} apart{first}"


@contextlib.contextmanager
def tokenised(
    documents: Iterable[str], tokenizer: Tokenizer, enough: int | None = None
) -> Iterator[TokenFile]:
    """Give a file of the documents' tokens, for as long as it is used.

    Args:
        documents: what it is made of.
        tokenizer: the model's.
        enough: tokens after which no further document is needed; None: all are.

    Raises:
        DataError: there is no document, or no room for the file.
    """
    if enough is not None:
        documents = _first(documents, tokenizer, enough)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "text.bin"
        write_tokens(path, documents, tokenizer, source="", least_tokens=1)
        yield TokenFile(path)


@torch.no_grad()
def evaluate(
    model: OpenMythos,
    file: TokenFile,
    token_bytes: NDArray[np.int64],
    loops: Sequence[int],
    *,
    reading: Reading | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Measure bits per byte at every depth of `loops`.

    End marks cost bits and count no byte. Depths share one run of the core, whose states are
    decoded at each.

    Args:
        model: put into evaluation mode for the measurement.
        file: held-out tokens.
        token_bytes: bytes that each token id stands for, `(vocab,)`.
        loops: depths, each 1 or more.
        reading: windows. Default: of the model's max_length, half of that apart.
        batch_size: windows at once.

    Raises:
        InputError: no depth, or one below 1; or a window longer than the model's max_length.
        DataError: windows that do not meet, or do not advance.
    """
    check_depths(loops)
    batches = _batches(model, file, reading, batch_size)
    nats, counts = np.zeros(len(loops)), _Counts(token_bytes)
    with _evaluating(model):
        for token_ids, counted in batches:
            nats += _losses(model, token_ids, counted, loops)
            counts.add(token_ids, counted)
    bits = nats / math.log(2) / max(1, counts.bytes)
    return Evaluation(tuple(loops), tuple(map(float, bits)), counts.tokens, counts.bytes)


@torch.no_grad()
def evaluate_halting(
    model: OpenMythos,
    file: TokenFile,
    token_bytes: NDArray[np.int64],
    *,
    halting: HaltingKind,
    threshold: float | None = None,
    budget: int,
    reading: Reading | None = None,
    batch_size: int = 8,
) -> HaltingEvaluation:
    """Measure bits per byte, and loops taken, where a rule decides when tokens leave the core.

    Args:
        model: put into evaluation mode for the measurement.
        file: held-out tokens.
        token_bytes: bytes that each token id stands for, `(vocab,)`.
        halting: the rule.
        threshold: its bound; None is its own default.
        budget: the most loops a token may take.
        reading: as for `evaluate`.
        batch_size: windows at once.

    Raises:
        InputError: a value does not fit the model or the rule.
        DataError: as for `evaluate`.
    """
    batches = _batches(model, file, reading, batch_size)
    rule = model.rule(halting, threshold)
    nats, taken, counts = 0.0, 0, _Counts(token_bytes)
    with _evaluating(model):
        for token_ids, counted in batches:
            out = model(token_ids[:, :-1], budget, halting=halting, threshold=threshold)
            losses = cross_entropy(out.logits, token_ids[:, 1:]).cpu().double()
            nats += float((losses * counted.cpu()).sum())
            taken += int((out.loops * counted).sum())
            counts.add(token_ids, counted)
    return HaltingEvaluation(
        halting=halting,
        threshold=None if rule is None else rule.threshold,
        budget=budget,
        mean_loops=taken / max(1, counts.tokens),
        bits_per_byte=nats / math.log(2) / max(1, counts.bytes),
        tokens=counts.tokens,
        bytes=counts.bytes,
    )


class _Counts:
    """Predictions that counted, and the bytes they stand for."""

    def __init__(self, token_bytes: NDArray[np.int64]) -> None:
        self.size = torch.from_numpy(token_bytes)
        self.tokens = self.bytes = 0

    def add(
        self, token_ids: Int[Tensor, "batch longer"], counted: Bool[Tensor, "batch sequence"]
    ) -> None:
        """Count the targets, which are all ids but each row's first."""
        self.tokens += int(counted.sum())
        targets = token_ids[:, 1:].cpu()
        self.bytes += int((self.size[targets] * counted.cpu()).sum())


def _first(documents: Iterable[str], tokenizer: Tokenizer, tokens: int) -> Iterator[str]:
    """Yield documents until they have so many tokens for certain, however well they compress."""
    most_bytes, sure = int(tokenizer.token_bytes.max()), 0
    for document in documents:
        yield document
        sure += math.ceil(len(document.encode()) / most_bytes) + 1  # the end mark
        if sure >= tokens:
            return


def _batches(
    model: OpenMythos, file: TokenFile, reading: Reading | None, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return batches of windows, `(batch, length + 1)` ids, and which predictions count."""
    most = model.config.max_length
    reading = Reading.of(most) if reading is None else reading
    length, max_tokens = reading.length, reading.max_tokens
    if not 1 <= length <= most:
        raise InputError(f"length={length} must be from 1 to the model's max_length={most}")
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens={max_tokens} must be 1 or more")
    windows = file.windows(length, reading.stride)
    count, device = len(windows.starts), model.embed.weight.device
    if max_tokens is not None:
        measured = np.cumsum(windows.length - windows.first)
        count = min(count, int(np.searchsorted(measured, max_tokens)) + 1)
    places = torch.arange(windows.length, device=device)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for at in range(0, count, batch_size):
            chunk = slice(at, min(at + batch_size, count))
            token_ids = torch.from_numpy(file.read(windows.starts[chunk], windows.length))
            first = torch.from_numpy(windows.first[chunk]).to(device)
            counted = places >= first.unsqueeze(1)
            yield token_ids.to(device), counted

    return batches()


@contextlib.contextmanager
def _evaluating(model: OpenMythos) -> Iterator[None]:
    """Put the model into evaluation mode, and back as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _losses(
    model: OpenMythos, ids: torch.Tensor, counted: torch.Tensor, loops: Sequence[int]
) -> NDArray[np.float64]:
    """Summed loss in nats of the counted predictions, at every depth."""
    inputs, targets, deepest = ids[:, :-1], ids[:, 1:], max(loops)
    shallower = sorted(set(loops) - {deepest})
    out = model(inputs, deepest, return_states=shallower)
    sums = []
    for depth in loops:
        logits = out.logits
        if depth != deepest:
            logits = model.decode(out.states[shallower.index(depth)])
        losses = cross_entropy(logits, targets).cpu().double()  # not every GPU has float64
        sums.append(float((losses * counted.cpu()).sum()))
    return np.array(sums)
