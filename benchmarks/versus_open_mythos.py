"""The same shapes in this package and in PyPI's open-mythos 0.5.0, in one interleaved run.

    pip install --no-deps open-mythos==0.5.0
    python benchmarks/versus_open_mythos.py [--attention mla] [--repeats 5] [--only decode] [--json]

`--no-deps` because it pins another torch and asks for packages that its model does not use; its
`main` module alone is imported. Vocabulary 4096, width 256, 8 heads, 4 KV heads, 32 routed
experts of 96, top 4, one shared expert of theirs (as wide as 4 experts), 8 loops, 1 prelude and 1
coda layer, batch 8 x 256. Their halting is kept from ending the loop early, so that both do 8
loops. Every figure is the best of one and two threads for each side; ratios are of medians.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import json
import re
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from openmythos import MythosConfig, OpenMythos
from openmythos.model.quantised import quantise
from openmythos.training.compiled import compiled_layers
from openmythos.training.depth import sample_loops
from openmythos.training.machine import matmul_peak, measure
from openmythos.training.optimizer import build_optimizers
from openmythos.training.settings import OptimizerConfig

BATCH, LENGTH, LOOPS, VOCAB = 8, 256, 8, 4096
PROMPT, DECODED = 128, 16
HOW = "pip install --no-deps open-mythos==0.5.0"


def our_model(attention: str) -> OpenMythos:
    """Our model of the shape above."""
    config = MythosConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_heads=8,
        kv_heads=4,
        attention=attention,
        q_latent=128,
        core_layers=1,
        mean_loops=LOOPS,
        feed_forward_size=344,
        experts=32,
        experts_per_token=4,
        expert_size=96,
        shared_experts=4,
    )
    return OpenMythos(config)


def their_model(attention: str) -> nn.Module:
    """Open-mythos 0.5.0's model of the same shape, made to run all of its loops."""
    spec = find_spec("open_mythos")
    if spec is None:
        sys.exit(f"open_mythos must be installed: {HOW}")
    package = types.ModuleType("open_mythos")  # its __init__ needs transformers; main does not
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["open_mythos"] = package
    main = importlib.import_module("open_mythos.main")
    config = main.MythosConfig(
        vocab_size=VOCAB,
        dim=256,
        n_heads=8,
        n_kv_heads=4,
        max_seq_len=1024,
        max_loop_iters=LOOPS,
        prelude_layers=1,
        coda_layers=1,
        attn_type=attention,
        kv_lora_rank=64,
        q_lora_rank=128,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_experts=32,
        n_shared_experts=1,
        n_experts_per_tok=4,
        expert_dim=96,
        lora_rank=8,
    )
    model: nn.Module = main.OpenMythos(config)
    with torch.no_grad():
        model.recurrent.act.halt.bias.fill_(-20.0)
    return model


Work = Callable[[], None]


def train_ours(model: OpenMythos, recipe: str) -> Work:
    """One optimizer step: `same` as theirs, or this package's `default` recipe."""
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH + 1))
    step, window = 0, 4 if recipe == "window" else None
    layers: Callable[[], contextlib.AbstractContextManager[None]]
    if recipe == "same":
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        bf16, layers = False, contextlib.nullcontext
    else:
        optimizer = build_optimizers(
            model.named_parameters(), OptimizerConfig(), fused_splits=model.fused_splits()
        )
        bf16 = measure("auto", torch.device("cpu")).precision == "bf16"
        layers = compiled_layers(model, sizes_vary=True)
        for threads in (1, 2):  # compile all forms: many sequences in the core, and one
            torch.set_num_threads(threads)
            with layers(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                depths = torch.tensor([3, *[2] * (BATCH // 2), *[1] * (BATCH - 1 - BATCH // 2)])
                model(ids[:, :-1], depths, backprop_loops=window).logits.float().sum().backward()

    def work() -> None:
        nonlocal step
        loops: Any = LOOPS
        if recipe != "same":
            drawn = sample_loops("poisson", LOOPS, seed=0, step=step, indices=range(BATCH))
            loops = torch.from_numpy(drawn)
        step += 1
        with layers():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                logits = model(ids[:, :-1], loops, backprop_loops=window).logits
            F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def train_theirs(model: nn.Module) -> Work:
    """One optimizer step of AdamW with full back-propagation."""
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def work() -> None:
        logits = model(ids[:, :-1], n_loops=LOOPS)
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def prefill_ours(model: OpenMythos, batch: int) -> Work:
    """Read a prompt into a cache."""
    ids = torch.randint(0, VOCAB, (batch, LENGTH))

    @torch.inference_mode()
    def work() -> None:
        model(ids, LOOPS, cache=model.new_cache(batch, LENGTH))

    return work


def prefill_theirs(model: nn.Module, batch: int) -> Work:
    """Read a prompt into a cache."""
    ids = torch.randint(0, VOCAB, (batch, LENGTH))

    @torch.inference_mode()
    def work() -> None:
        model(ids, n_loops=LOOPS, kv_cache={})

    return work


def decode_ours(model: OpenMythos, batch: int) -> Work:
    """Decode `DECODED` tokens behind a prompt."""
    ids = torch.randint(0, VOCAB, (batch, PROMPT + DECODED))
    with torch.inference_mode():
        cache = model.new_cache(batch, PROMPT + DECODED)
        model(ids[:, :PROMPT], LOOPS, cache=cache)

    @torch.inference_mode()
    def work() -> None:
        cache.rollback(cache.length - PROMPT)
        for at in range(PROMPT, PROMPT + DECODED):
            model(ids[:, at : at + 1], LOOPS, cache=cache)

    return work


def decode_theirs(model: nn.Module, batch: int) -> Work:
    """Decode `DECODED` tokens behind a prompt; the cache's dictionaries are copied each time."""
    ids = torch.randint(0, VOCAB, (batch, PROMPT + DECODED))
    full: dict[str, dict[str, torch.Tensor]] = {}
    with torch.inference_mode():
        model(ids[:, :PROMPT], n_loops=LOOPS, kv_cache=full)

    @torch.inference_mode()
    def work() -> None:
        cache = {name: dict(entry) for name, entry in full.items()}
        for at in range(PROMPT, PROMPT + DECODED):
            model(ids[:, at : at + 1], n_loops=LOOPS, kv_cache=cache, start_pos=at)

    return work


def best_medians(ours: Work, theirs: Work, repeats: int) -> tuple[float, float]:
    """Seconds of each side at its better thread count, measured in turn."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(repeats + 1):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for side, work in (("ours", ours), ("theirs", theirs)):
                start = time.perf_counter()
                work()
                if turn:
                    seconds.setdefault((side, threads), []).append(time.perf_counter() - start)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    best = [min(medians[side, 1], medians[side, 2]) for side in ("ours", "theirs")]
    return best[0], best[1]


Row = tuple[int, Callable[[], Work], Callable[[], Work]]
"""Tokens of a call, and what makes each side's."""


def measure_all(attention: str, repeats: int, only: str) -> dict[str, dict[str, float]]:
    """The rows whose names start with `only`: tokens per second of both sides, and their ratio."""
    ours, theirs = our_model(attention), their_model(attention)
    results = {}
    for name, (tokens, mine, other) in rows_of(ours, theirs).items():
        if name.startswith(only):
            training = name.startswith("training")
            ours.train(training), theirs.train(training)
            results[name] = row(tokens, *best_medians(mine(), other(), repeats))
    return results


def rows_of(ours: OpenMythos, theirs: nn.Module) -> dict[str, Row]:
    """All rows; those in bf16 only where its products are quick."""
    rows: dict[str, Row] = {}
    recipes = {
        "training, fp32, same optimizer": "same",
        "training, default recipe": "default",
        "training, default recipe, gradient through 4 loops": "window",
    }
    for name, recipe in recipes.items():
        rows[name] = (
            BATCH * LENGTH,
            lambda recipe=recipe: train_ours(ours, recipe),  # type: ignore[misc]
            lambda: train_theirs(theirs),
        )
    forms: dict[str, Callable[[OpenMythos], OpenMythos]] = {
        "": lambda model: model,
        ", our weights in int8": quantise,
    }
    if measure("auto", torch.device("cpu")).precision == "bf16":
        forms[", our weights in bf16"] = lambda model: model.bfloat16()
    tasks = {"prefill": (prefill_ours, prefill_theirs), "decode": (decode_ours, decode_theirs)}
    for form, change in forms.items():
        for task, (mine, other) in tasks.items():
            for batch in (1, 8):
                tokens = batch * (DECODED if task == "decode" else LENGTH)
                rows[f"{task}, batch {batch}{form}"] = (
                    tokens,
                    lambda change=change, mine=mine, batch=batch: mine(  # type: ignore[misc]
                        change(copy.deepcopy(ours)), batch
                    ),
                    lambda other=other, batch=batch: other(theirs, batch),  # type: ignore[misc]
                )
    return rows


def row(tokens: int, ours: float, theirs: float) -> dict[str, float]:
    """Tokens per second and the ratio of the medians."""
    return {"ours": tokens / ours, "theirs": tokens / theirs, "ratio": theirs / ours}


def peak_memory(attention: str) -> dict[str, float]:
    """MiB that three training steps add to a process that holds the model, for each side."""
    used = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, __file__, "--attention", attention, "--memory", side]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        used[side] = float(output.split()[-1])
    return {**used, "ratio": used["ours"] / used["theirs"]}


def memory_of(side: str, attention: str) -> float:
    """MiB between the process with its model and its peak in training."""
    if side == "ours":
        work = train_ours(our_model(attention).train(), "same")
    else:
        work = train_theirs(their_model(attention).train())
    before = peak_mib()
    for _ in range(3):
        work()
    return peak_mib() - before


def peak_mib() -> float:
    """Most memory this process has had. `getrusage` would start from its parent's on Linux."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def decode_limit(attention: str) -> dict[str, float]:
    """What bounds decoding at batch 1: operations to dispatch, and weights to read."""
    torch.set_num_threads(1)
    model = our_model(attention).eval()
    work = decode_ours(model, 1)
    work()
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity) as profile:
        work()
    operations = sum(event.cpu_parent is None for event in profile.events()) / DECODED
    row_ = torch.randn(1, 256)
    dispatch = seconds_each(lambda: row_ + row_)
    expert = model.core.layers[0].feed_forward
    one = (expert.w_in[0].numel() + expert.w_out[0].numel()) * 4
    unused = (len(expert.w_in) - 4) * one
    core = sum(p.numel() for p in model.core.layers.parameters()) * 4 - unused
    total = sum(p.numel() for p in model.parameters()) * 4
    outer = total - core - unused
    read = outer + LOOPS * core
    matrix = torch.randn(total // 4 // 256, 256)  # a working set as large as the model
    bandwidth = matrix.nbytes / seconds_each(lambda: F.linear(row_, matrix), 20)
    limit = operations * dispatch + read / bandwidth
    medians = [timed(work) for _ in range(5)]
    measured = statistics.median(medians) / DECODED
    return {
        "operations": operations,
        "dispatch_us": 1e6 * dispatch,
        "weights_read_mb": read / 1e6,
        "bandwidth_gb_s": bandwidth / 1e9,
        "gflop": model.flops(PROMPT, LOOPS) / 1e9,
        "peak_gflop_s": matmul_peak(torch.float32, torch.device("cpu")) / 1e9,
        "limit_ms": 1e3 * limit,
        "measured_ms": 1e3 * measured,
        "share_of_limit": limit / measured,
    }


@torch.inference_mode()
def seconds_each(call: Callable[[], object], repeats: int = 2000) -> float:
    """Median seconds of one call, over batches of calls."""
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        runs.append((time.perf_counter() - start) / repeats)
    return statistics.median(runs)


def timed(call: Work) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--attention", choices=["gqa", "mla"], default="gqa")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose names start so")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    settings = parser.parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    if settings.memory:
        print(memory_of(settings.memory, settings.attention))
        return
    rows = measure_all(settings.attention, settings.repeats, settings.only)
    memory = "training, peak MiB above the model"
    if memory.startswith(settings.only):
        rows[memory] = peak_memory(settings.attention)
    limit = {} if settings.only else decode_limit(settings.attention)
    if settings.json:
        print(json.dumps({"rows": rows, "decode_limit": limit}, indent=2))
        return
    print(f"{settings.attention}, tokens/s (memory: MiB), medians of {settings.repeats}")
    print("| | this package | open-mythos 0.5.0 | ratio |")
    print("|---|---|---|---|")
    for name, values in rows.items():
        ours, theirs, ratio = (values[key] for key in ("ours", "theirs", "ratio"))
        print(f"| {name} | {ours:,.0f} | {theirs:,.0f} | {ratio:.2f} |")
    if limit:
        found = ", ".join(f"{key} {value:.3g}" for key, value in limit.items())
        print(f"\ndecode, batch 1, one thread: {found}")


if __name__ == "__main__":
    main()
