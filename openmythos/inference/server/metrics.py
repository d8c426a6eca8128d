"""What the server counts, for Prometheus: vLLM's names with our prefix, and the loops besides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from openmythos.inference.engine import Statistics
from openmythos.inference.request import Event, FinishEvent, TokenEvent

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "openmythos:"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = tuple(float(1 << power) for power in range(21))
LOOPS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0)


@final
class Metrics:
    """Counters and histograms of one server, in a registry of their own.

    Args:
        model_name: the label that all of them carry.
    """

    def __init__(self, model_name: str) -> None:
        self.registry, self.model_name = CollectorRegistry(), model_name
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts read")
        self.new_tokens = self._counter("generation_tokens", "Tokens drawn")
        self.loops = self._counter("loops", "Loops of all tokens drawn together")
        self.prompt_loops = self._counter("prompt_loops", "Loops of all prompt positions together")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request to its first token", SECONDS
        )
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds", "From a token of a choice to its next", SECONDS
        )
        self.whole = self._histogram(
            "e2e_request_latency_seconds", "From a request to the end of a choice", SECONDS
        )
        self.request_prompt = self._histogram(
            "request_prompt_tokens", "Tokens of a request's prompt", TOKENS
        )
        self.request_new = self._histogram(
            "request_generation_tokens", "Tokens of a finished choice", TOKENS
        )
        self.request_loops = self._histogram(
            "request_mean_loops", "Mean loops of a token in a finished choice", LOOPS
        )
        self._finished = Counter(
            f"{PREFIX}request_success",
            "Choices that finished, by reason",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._answered = Counter(
            f"{PREFIX}http_requests",
            "HTTP requests answered, by route and status",
            ["path", "status"],
            registry=self.registry,
        )

    def meter(self) -> Callable[[Event], None]:
        """Return what takes the events of one request, from now on, from any thread."""
        return _Meter(self).take

    def finished(self, reason: str) -> None:
        """Count a choice that has ended."""
        self._finished.labels(self.model_name, reason).inc()

    def answered(self, path: str, status: int) -> None:
        """Count a response."""
        self._answered.labels(path, str(status)).inc()

    def watch(self, engine: Callable[[], list[Metric]]) -> None:
        """Let each page ask the engine how it stands."""
        self.registry.register(_Engine(engine))

    def page(self) -> bytes:
        """Return all of it as text."""
        return generate_latest(self.registry)

    def gauge(self, name: str, text: str, value: float) -> Metric:
        """Return a value that goes up and down."""
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self.model_name], value)
        return family

    def total(self, name: str, text: str, value: float) -> Metric:
        """Return a sum that somebody else keeps."""
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self.model_name], value)
        return family

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(PREFIX + name, text, ["model_name"], registry=self.registry)
        return counter.labels(self.model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            PREFIX + name, text, ["model_name"], registry=self.registry, buckets=buckets
        )
        return histogram.labels(self.model_name)


@final
class _Meter:
    """The clock of one request: its start, and each choice's last token."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._start = metrics, time.perf_counter()
        self._last: dict[int, float] = {}
        self._read = False  # are the prompt's tokens counted? Every finish brings them

    def take(self, event: Event) -> None:
        """Count an event."""
        if isinstance(event, TokenEvent):
            self._token(event)
        elif isinstance(event, FinishEvent):
            self._finish(event)

    def _token(self, event: TokenEvent) -> None:
        now, metrics = time.perf_counter(), self._metrics
        if not self._last:
            metrics.first_token.observe(now - self._start)
        last = self._last.get(event.choice)
        if last is not None:
            metrics.between_tokens.observe(now - last)
        self._last[event.choice] = now
        metrics.new_tokens.inc()
        metrics.loops.inc(event.loops)

    def _finish(self, event: FinishEvent) -> None:
        metrics = self._metrics
        metrics.finished(event.reason)
        if event.reason in ("stop", "length"):  # what was given up early would look quick
            metrics.whole.observe(time.perf_counter() - self._start)
        metrics.request_new.observe(event.new_tokens)
        if event.new_tokens:
            metrics.request_loops.observe(event.loops / event.new_tokens)
        read = event.new_tokens or event.reason in ("stop", "length")
        if read and not self._read:
            self._read = True
            metrics.request_prompt.observe(event.prompt_tokens)
            metrics.prompt_tokens.inc(event.prompt_tokens)
            metrics.prompt_loops.inc(event.prompt_loops)


@final
class _Engine(Collector):
    """Asks the engine anew for each page."""

    def __init__(self, engine: Callable[[], list[Metric]]) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield how it stands."""
        yield from self._engine()

    def describe(self) -> Iterator[Metric]:
        """Ask nothing when registered."""
        yield from ()


def engine_metrics(now: Statistics, metrics: Metrics) -> list[Metric]:
    """Return what an engine says of itself."""
    gauge, total, done = metrics.gauge, metrics.total, now.done
    return [
        gauge("num_requests_running", "Requests in flight", now.running),
        gauge("num_requests_waiting", "Requests that wait for admission", now.waiting),
        gauge(
            "kv_cache_usage_perc",
            "Part of the cache's pages that requests in flight hold or were promised, from 0 to 1",
            (now.pages_used + now.pages_promised) / now.pages_total,
        ),
        gauge("core_rows", "Positions in the core", now.rows),
        total(
            "prefix_cache_queries", "Prompt tokens looked up in the cache", done.looked_up_tokens
        ),
        total("prefix_cache_hits", "Prompt tokens found in the cache", done.cached_tokens),
        total("spec_decode_num_draft_tokens", "Tokens drafted", done.drafted_tokens),
        total("spec_decode_num_accepted_tokens", "Drafts that proved true", done.accepted_tokens),
        total("ticks", "Passes of the core", done.ticks),
        total("row_loops", "Positions that a pass of the core took, together", done.row_loops),
    ]
