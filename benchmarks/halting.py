"""Does an exited token really cost nothing more? Wall time against the work that is left.

Half of the tokens leave the core after 2 of 16 loops. The bound is what the same model needs
without any halting for exactly that work: every row for 2 loops, and half of the rows for 14
more, both measured at fixed depth in the same, interleaved run.

    python benchmarks/halting.py [--attention mla] [--repeats 9]

Prefill of 256 tokens: at batch 8 the half that goes on is every other token; its bound takes half
of the sequences, at batch 1 the second half of the sequence behind a cache of the first. Decode:
at batch 8 every other sequence leaves; at batch 1 every other token does, and the bound is the
mean of the two depths.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from openmythos import MythosConfig, OpenMythos

EARLY, LATE = 2, 16
PROMPT, DECODED = 256, 16


def shape(attention: str) -> MythosConfig:
    """The benchmark's model: a core of two layers with experts."""
    return MythosConfig(
        vocab_size=4096,
        hidden_size=256,
        num_heads=8,
        kv_heads=4,
        core_layers=2,
        mean_loops=8,
        experts=32,
        experts_per_token=4,
        expert_size=96,
    ).replace(attention=attention)


def interleaved(variants: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Time every variant in turn, `repeats` times over; medians in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def budgets(batch: int, sequence: int) -> torch.Tensor:
    """Loops of each token: every other token (or sequence, when decoding) leaves early."""
    index = torch.arange(batch).unsqueeze(1) + torch.arange(sequence)
    return torch.where(index % 2 == 0, EARLY, LATE)


def prefill(model: OpenMythos, batch: int, repeats: int) -> dict[str, float]:
    """Prefill `PROMPT` tokens of `batch` sequences."""
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT))
    loops = budgets(batch, PROMPT)
    half = batch // 2

    def run(token_ids: torch.Tensor, depth: int | torch.Tensor) -> None:
        cache = model.new_cache(token_ids.shape[0], PROMPT, loops=LATE)
        model(token_ids, depth, cache=cache)

    def halted() -> None:
        run(ids, loops)

    if half:
        variants = {
            "halted": halted,
            "all early": lambda: run(ids, EARLY),
            "half early": lambda: run(ids[:half], EARLY),
            "half late": lambda: run(ids[:half], LATE),
            "all late": lambda: run(ids, LATE),
        }
    else:
        first = model.new_cache(1, PROMPT, loops=LATE)
        model(ids[:, : PROMPT // 2], LATE, cache=first)

        def second(depth: int) -> None:
            first.rollback(first.length - PROMPT // 2)
            model(ids[:, PROMPT // 2 :], depth, cache=first)

        variants = {
            "halted": halted,
            "all early": lambda: run(ids, EARLY),
            "half early": lambda: second(EARLY),
            "half late": lambda: second(LATE),
            "all late": lambda: run(ids, LATE),
        }
    return summary(interleaved(variants, repeats))


def decode(model: OpenMythos, batch: int, repeats: int) -> dict[str, float]:
    """Decode `DECODED` tokens behind a prompt of `PROMPT`."""
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT + DECODED))
    loops = budgets(batch, DECODED)
    half = max(1, batch // 2)

    def make(rows: int) -> Callable[[int | torch.Tensor], None]:
        cache = model.new_cache(rows, PROMPT + DECODED, loops=LATE)
        model(ids[:rows, :PROMPT], LATE, cache=cache)

        def run(depth: int | torch.Tensor) -> None:
            cache.rollback(cache.length - PROMPT)
            for at in range(DECODED):
                now = depth if isinstance(depth, int) else depth[:rows, at : at + 1]
                model(ids[:rows, PROMPT + at : PROMPT + at + 1], now, cache=cache)

        return run

    everyone, some = make(batch), make(half)
    if batch == 1:  # every other token leaves early: half of the time at each depth
        seconds = interleaved(
            {
                "halted": lambda: everyone(loops),
                "all early": lambda: everyone(EARLY),
                "all late": lambda: everyone(LATE),
            },
            repeats,
        )
        bound = (seconds["all early"] + seconds["all late"]) / 2
        return report(seconds["halted"], bound, seconds["all late"])
    seconds = interleaved(
        {
            "halted": lambda: everyone(loops),
            "all early": lambda: everyone(EARLY),
            "half early": lambda: some(EARLY),
            "half late": lambda: some(LATE),
            "all late": lambda: everyone(LATE),
        },
        repeats,
    )
    return summary(seconds)


def summary(seconds: dict[str, float]) -> dict[str, float]:
    """All rows to the early depth, then half of them from there to the late one."""
    bound = seconds["all early"] + seconds["half late"] - seconds["half early"]
    return report(seconds["halted"], bound, seconds["all late"])


def report(halted: float, bound: float, full: float) -> dict[str, float]:
    """Milliseconds and ratios."""
    return {
        "halted_ms": 1e3 * halted,
        "bound_ms": 1e3 * bound,
        "full_depth_ms": 1e3 * full,
        "over_bound": halted / bound,
        "saved": 1 - halted / full,
    }


def main() -> None:
    """Print the table, and JSON with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--attention", choices=["gqa", "mla"], default="gqa")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    settings = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(settings.threads)
    model = OpenMythos(shape(settings.attention)).eval()
    rows = {}
    with torch.inference_mode():
        for name, measure in (("prefill", prefill), ("decode", decode)):
            for batch in (1, 8):
                rows[f"{name}, batch {batch}"] = measure(model, batch, settings.repeats)
    if settings.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"half of the tokens leave after {EARLY} of {LATE} loops, {settings.attention}, medians")
    print("| | with exits, ms | bound, ms | over the bound | full depth, ms | saved |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['halted_ms']:.1f} | {row['bound_ms']:.1f} "
            f"| {row['over_bound']:.2f} | {row['full_depth_ms']:.1f} | {row['saved']:.0%} |"
        )


if __name__ == "__main__":
    main()
