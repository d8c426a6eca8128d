"""Requests that arrive at random, a driver that serves them, and what it measures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from openmythos.inference.generate import generate
from openmythos.inference.language_model import LanguageModel
from openmythos.inference.passes import page_bytes
from openmythos.inference.request import Event, Request, TokenEvent
from openmythos.inference.sampling import Sampling
from openmythos.inference.thinking import Thinking
from openmythos.inference.ticks import Ticker
from openmythos.training.corpus import open_corpus

GREEDY = Sampling(temperature=0)
BATCH = 8
"""Sequences of a static batch."""


@dataclass(frozen=True)
class Arrival:
    """A request and when it comes, in seconds."""

    at: float
    request: Request


@dataclass
class Served:
    """What became of a load."""

    arrivals: Sequence[Arrival]
    tokens: list[list[tuple[float, TokenEvent]]]
    """Of each request: when each token came."""
    ticks: list[float] = field(default_factory=list)
    """Seconds of each tick."""
    pages: int = 0
    """Most pages in use."""
    page_bytes: int = 0

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        return max(found[-1][0] for found in self.tokens) - self.arrivals[0].at

    def figures(self) -> dict[str, float]:
        """Tokens per second, waits in milliseconds, loops per token, bytes of cache."""
        count = sum(map(len, self.tokens))
        pairs = zip(self.arrivals, self.tokens, strict=True)
        first = [1e3 * (found[0][0] - arrival.at) for arrival, found in pairs]
        gaps = [1e3 * gap for found in self.tokens for gap in np.diff([at for at, _ in found])]
        loops = [event.loops for found in self.tokens for _, event in found]
        return {
            "tokens_per_second": count / self.seconds,
            "first_token_ms": statistics.median(first),
            "first_token_p99_ms": float(np.percentile(first, 99)),
            "between_tokens_ms": statistics.median(gaps) if gaps else 0.0,
            "between_tokens_p99_ms": float(np.percentile(gaps, 99)) if gaps else 0.0,
            "loops_per_token": statistics.fmean(loops),
            "cache_mib": self.pages * self.page_bytes / 2**20,
        }

    @property
    def token_ids(self) -> list[list[int]]:
        """The tokens of each request."""
        return [[event.token_id for _, event in found] for found in self.tokens]


def texts(lm: LanguageModel, count: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts of 8 to 96 tokens from the held-out part of the embedded text."""
    random = np.random.default_rng([seed, 0])
    text = "\n".join(open_corpus("embedded").validation_documents())
    ids = lm.tokenizer.encode(text)
    lengths = random.integers(8, 97, count)
    starts = random.integers(0, len(ids) - 97, count)
    return [tuple(ids[at : at + n]) for at, n in zip(starts, lengths, strict=True)]


def poisson(requests: Sequence[Request], rate: float, seed: int) -> list[Arrival]:
    """Let requests arrive at random, `rate` a second on average, the first at 0."""
    waits = np.random.default_rng([seed, 1]).exponential(1 / rate, len(requests))
    times = np.cumsum(waits) - waits[0]
    return [Arrival(float(at), request) for at, request in zip(times, requests, strict=True)]


def ticker(lm: LanguageModel, *, deterministic: bool = True, pages: int = 16384) -> Ticker:
    """The engine without its thread and queues, nothing shared between requests."""
    return Ticker(
        lm, pages=pages, budget=64, chunk=32, deterministic=deterministic, prefix_sharing=False
    )


@torch.inference_mode()
def serve(engine: Ticker, arrivals: Sequence[Arrival]) -> Served:
    """Serve requests as they come, with ticks as long as any is in flight."""
    size = page_bytes(engine.model)
    served = Served(arrivals, [[] for _ in arrivals], page_bytes=size)
    start = time.perf_counter()

    def hear(number: int, event: Event) -> None:
        if isinstance(event, TokenEvent):
            served.tokens[number].append((time.perf_counter() - start, event))

    waiting = list(enumerate(arrivals))
    while waiting or not engine.idle:
        now = time.perf_counter() - start
        while waiting and waiting[0][1].at <= now:
            number, arrival = waiting.pop(0)
            engine.prepare(arrival.request)
            engine.add(arrival.request, lambda event, number=number: hear(number, event))
        if engine.idle:
            time.sleep(max(0.0, waiting[0][1].at - now))
            continue
        before = time.perf_counter()
        engine.tick()
        served.ticks.append(time.perf_counter() - before)
        served.pages = max(served.pages, engine.pages.used)
    return served


Write = Callable[[Tensor, Tensor, int, int], Iterable[tuple[list[int], list[int]]]]
"""From padded prompts `(batch, longest)`, their mask, new tokens and loops: at each step, every
row's token and the loops it took."""


def writer(lm: LanguageModel) -> Write:
    """Write batches with this package's own reference."""

    def write(
        token_ids: Tensor, mask: Tensor, new: int, loops: int
    ) -> Iterator[tuple[list[int], list[int]]]:
        steps = generate(
            lm.model,
            token_ids,
            max_new_tokens=new,
            thinking=Thinking(loops=loops),
            sampling=GREEDY,
            mask=mask,
            vocab_size=lm.tokenizer.vocab_size,
        )
        for step in steps:
            yield step.token_ids.tolist(), step.loops.tolist()

    return write


@torch.inference_mode()
def serve_in_batches(arrivals: Sequence[Arrival], write: Write) -> Served:
    """Serve batches in order of arrival: all wait for the slowest, at the depth of the deepest."""
    served = Served(arrivals, [[] for _ in arrivals])
    start = time.perf_counter()
    for first in range(0, len(arrivals), BATCH):
        some = arrivals[first : first + BATCH]
        time.sleep(max(0.0, some[-1].at - (time.perf_counter() - start)))
        requests = [arrival.request for arrival in some]
        longest = max(len(request.token_ids) for request in requests)
        token_ids = torch.zeros(len(some), longest, dtype=torch.int64)
        mask = torch.zeros(len(some), longest, dtype=torch.bool)
        for row, request in enumerate(requests):
            token_ids[row, : len(request.token_ids)] = torch.tensor(request.token_ids)
            mask[row, : len(request.token_ids)] = True
        loops = max(request.thinking.loops or 1 for request in requests)
        most = max(request.max_new_tokens for request in requests)
        for step, (tokens, taken) in enumerate(write(token_ids, mask, most, loops)):
            now = time.perf_counter() - start
            for row, request in enumerate(requests):
                if step < request.max_new_tokens:
                    event = TokenEvent(choice=0, token_id=tokens[row], text="", loops=taken[row])
                    served.tokens[first + row].append((now, event))
    return served
