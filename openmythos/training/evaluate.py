"""Bits per byte of a text at several depths, from one run of the core, or with a halting rule."""

from __future__ import annotations

import contextlib
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
    """None: the rule's own default."""
    budget: int
    """The most loops a token could take."""
    mean_loops: float
    bits_per_byte: float
    tokens: int
    bytes: int


@contextlib.contextmanager
def tokenised(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[TokenFile]:
    """Give a file of the documents' tokens, for as long as it is used.

    Raises:
        DataError: there is no document, or no room for the file.
    """
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
    length: int,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
) -> Evaluation:
    """Measure bits per byte at every depth of `loops`.

    End marks cost bits and count no byte. Depths share one run of the core, whose states are
    decoded at each.

    Args:
        model: put into evaluation mode for the measurement.
        file: held-out tokens.
        token_bytes: bytes that each token id stands for, `(vocab,)`.
        loops: depths, each 1 or more.
        length: tokens in a window.
        stride: tokens a window advances; smaller gives more context. Default: half of `length`.
        batch_size: windows at once.
        max_tokens: stop with the window that has so many predictions full, for a quick look; None:
            all.

    Raises:
        InputError: no depth, or one below 1; or a window longer than the model's max_length.
    """
    check_depths(loops)
    batches = _batches(model, file, length, stride, batch_size, max_tokens)
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
    length: int,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
) -> HaltingEvaluation:
    """Measure bits per byte, and loops taken, where a rule decides when tokens leave the core.

    Args:
        model: put into evaluation mode for the measurement.
        file: held-out tokens.
        token_bytes: bytes that each token id stands for, `(vocab,)`.
        halting: the rule.
        threshold: its bound; None is its own default.
        budget: the most loops a token may take.
        length: tokens in a window.
        stride: as for `evaluate`; so are the rest.
        batch_size: windows at once.
        max_tokens: as for `evaluate`.

    Raises:
        InputError: a value does not fit the model or the rule.
    """
    batches = _batches(model, file, length, stride, batch_size, max_tokens)
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
        threshold=threshold,
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


def _batches(
    model: OpenMythos,
    file: TokenFile,
    length: int,
    stride: int | None,
    batch_size: int,
    max_tokens: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return batches of windows, `(batch, length + 1)` ids, and which predictions count."""
    if not 1 <= length <= model.config.max_length:
        raise InputError(
            f"length={length} must be from 1 to the model's max_length={model.config.max_length}"
        )
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens={max_tokens} must be 1 or more")
    windows = file.windows(length, max(1, length // 2) if stride is None else stride)
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
