"""How fast this machine is, and how fast a model trains, reads and writes on it.

Everything is measured in rounds: each round runs every task once with every number of threads,
so that other load falls on all alike. Reported are medians over the rounds, with the number of
threads that was best for each task.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openmythos.config import MythosConfig
from openmythos.errors import InputError
from openmythos.inference.precision import weights_of
from openmythos.model.accounting import training_flops
from openmythos.model.transformer import OpenMythos, cross_entropy
from openmythos.training.machine import Machine, matmul_peak, measure, seconds_of
from openmythos.training.optimizer import build_optimizers
from openmythos.training.settings import OptimizerConfig

TRAINING_TOKENS = 2048
"""Tokens in a training step."""
PROMPT = 128
"""Tokens of a prompt where nobody says how many."""


@dataclass(frozen=True)
class Speed:
    """One task, at its best number of threads."""

    task: str
    """`training`, `prefill` or `decode`."""
    batch: int
    length: int
    """Tokens of each sequence: in training and prefill those of a call, in decode those before."""
    loops: int
    threads: int
    tokens_per_second: float
    share_of_peak: float
    """Of the matrix products' peak with as many threads, in bf16 where the weights are, else in
    fp32, which int8 weights may exceed; forward and backward count."""


@dataclass(frozen=True)
class Bench:
    """What was measured."""

    machine: Machine
    """Precision of the training, and why."""
    peaks: dict[str, float]
    """Floating-point operations per second of a matrix product, by precision: the best."""
    weights: str
    """What the weights are in prefill and decode: `fp32`, `bf16` or `int8`. Those of a training
    are fp32."""
    speeds: list[Speed]


@dataclass(frozen=True)
class Task:
    """Something to time: what it is, what one call does, and how much work that is."""

    task: str
    batch: int
    length: int
    loops: int
    call: Callable[[], object]
    tokens: int
    flops: float


def bench(
    model: OpenMythos,
    *,
    loops: Sequence[int] = (1, 4, 16),
    batches: Sequence[int] = (1, 8),
    length: int | None = None,
    threads: Sequence[int] | None = None,
    repeats: int = 5,
    report: Callable[[int], None] = lambda _: None,
) -> Bench:
    """Measure.

    Args:
        model: in evaluation mode, on the device to measure, with the weights to measure.
        loops: depths of prefill and decode; training runs at the mean.
        batches: sequences of prefill and decode.
        length: tokens of a prompt, at most half of the model's max_length; default: 128, or that
            half.
        threads: numbers of CPU threads to try; default: 1 and all cores.
        repeats: rounds.
        report: told after each round how many are done.

    Raises:
        InputError: `length` leaves no room for what is written after the prompt.
    """
    length = _prompt_length(length, model.config.max_length)
    device, before = model.embed.weight.device, torch.get_num_threads()
    machine = measure("auto", device)
    tasks = list(_tasks(model, machine, loops, batches, length))
    counts = list(threads or default_threads(device))
    seconds: dict[tuple[int, int], list[float]] = {}
    peaks: dict[tuple[str, int], float] = {}
    try:
        for done in range(repeats):
            for count in counts:
                torch.set_num_threads(count)
                _measure_peaks(peaks, count, machine, device)
                for number, task in enumerate(tasks):
                    if done == 0:
                        task.call()  # the first call allocates
                    seconds.setdefault((number, count), []).append(seconds_of(task.call, device))
            report(done + 1)
    finally:
        torch.set_num_threads(before)
    weights = weights_of(model)
    read = "bf16" if weights == "bf16" else "fp32"
    precisions = {"training": machine.precision, "prefill": read, "decode": read}
    speeds = [
        _best(task, {count: seconds[number, count] for count in counts}, peaks, precisions)
        for number, task in enumerate(tasks)
    ]
    best = {kind: max(v for (k, _), v in peaks.items() if k == kind) for kind, _ in peaks}
    return Bench(machine, best, weights, speeds)


def _prompt_length(asked: int | None, max_length: int) -> int:
    most = max_length // 2
    if asked is None:
        return min(PROMPT, most)
    if asked > most:
        raise InputError(
            f"length={asked} must be at most {most}, half of the model's max_length={max_length}: "
            "what is written after the prompt needs room"
        )
    return asked


def default_threads(device: torch.device) -> list[int]:
    """One thread and as many as there are cores, on a CPU; elsewhere they matter little."""
    if device.type != "cpu":
        return [torch.get_num_threads()]
    usable = getattr(os, "sched_getaffinity", None)
    cores = len(usable(0)) if usable is not None else os.cpu_count() or 1
    return sorted({1, min(cores, torch.get_num_threads()), cores})


def _measure_peaks(
    peaks: dict[tuple[str, int], float], threads: int, machine: Machine, device: torch.device
) -> None:
    """Keep the best product so far; bf16 is measured once where it is hopeless."""
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        known = peaks.get((name, threads))
        if name == "bf16" and machine.precision == "fp32" and known is not None:
            continue
        peaks[name, threads] = max(known or 0.0, matmul_peak(dtype, device))


def _best(
    task: Task,
    seconds: dict[int, list[float]],
    peaks: dict[tuple[str, int], float],
    precisions: dict[str, str],
) -> Speed:
    """The number of threads whose median is shortest; the fewest of equals."""
    threads = min(seconds, key=lambda count: (statistics.median(seconds[count]), count))
    median = statistics.median(seconds[threads])
    return Speed(
        task=task.task,
        batch=task.batch,
        length=task.length,
        loops=task.loops,
        threads=threads,
        tokens_per_second=task.tokens / median,
        share_of_peak=task.flops / median / peaks[precisions[task.task], threads],
    )


def _tasks(
    model: OpenMythos, machine: Machine, loops: Sequence[int], batches: Sequence[int], length: int
) -> Iterator[Task]:
    yield _training(model.config, machine, model.embed.weight.device)
    for batch in batches:
        for depth in loops:
            yield _prefill(model, batch, length, depth)
    for batch in batches:
        for depth in loops:
            yield _decode(model, batch, length, depth)


def _training(config: MythosConfig, machine: Machine, device: torch.device) -> Task:
    """A step at the mean loops, every loop with gradient: forward, backward and optimizers."""
    length = min(256, config.max_length)
    batch, loops = max(1, TRAINING_TOKENS // length), config.mean_loops
    model = OpenMythos(config).to(device)
    optimizers = build_optimizers(
        model.named_parameters(), OptimizerConfig(), fused_splits=model.fused_splits()
    )
    token_ids = _some_ids(config, batch, length + 1, device)

    def step() -> None:
        optimizers.zero_grad()
        bf16 = machine.precision == "bf16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            out = model(token_ids[:, :-1], loops)
            loss = cross_entropy(out.logits, token_ids[:, 1:]).mean()
        loss.backward()
        optimizers.step()

    tokens = batch * length
    flops = training_flops(model, tokens, length // 2, loops)
    return Task("training", batch, length, loops, step, tokens, flops)


def _prefill(model: OpenMythos, batch: int, length: int, loops: int) -> Task:
    token_ids = _some_ids(model.config, batch, length, model.embed.weight.device)
    cache = model.new_cache(batch, length, loops=loops)

    @torch.inference_mode()
    def call() -> None:
        cache.rollback(cache.length)
        model(token_ids, loops, cache=cache)

    tokens = batch * length
    flops = float(tokens * model.flops(length // 2, loops))
    return Task("prefill", batch, length, loops, call, tokens, flops)


def _decode(model: OpenMythos, batch: int, length: int, loops: int, new: int = 16) -> Task:
    """Some single-token calls after a prompt, which is read once."""
    token_ids = _some_ids(model.config, batch, length + new, model.embed.weight.device)
    cache = model.new_cache(batch, length + new, loops=loops)

    @torch.inference_mode()
    def call() -> None:
        if not cache.length:
            model(token_ids[:, :length], loops, cache=cache)
        for at in range(length, length + new):
            model(token_ids[:, at : at + 1], loops, cache=cache)
        cache.rollback(new)

    tokens = batch * new
    flops = float(tokens * model.flops(length + new // 2, loops, decoding=True))
    return Task("decode", batch, length, loops, call, tokens, flops)


def _some_ids(config: MythosConfig, batch: int, length: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (batch, length), generator=generator).to(device)
