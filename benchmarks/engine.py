"""The inference engine against other ways to serve the same requests, in interleaved runs.

    python benchmarks/engine.py [--part load ...] [--repeats 3] [--requests 48] [--rate 40] [--json]

Parts:
    load         requests that arrive at random (Poisson), of mixed lengths and depths, on the
                 shipped language model: this engine, static batches of 8, and continuous batching
                 at one depth for all, which is the same engine with every request at the most loops
    reasoner     chains of hops on the shipped reasoner, whose gate ends each place by itself,
                 against the same engine at full depth
    theirs       PyPI's open-mythos 0.5.0, `generate` at the shapes of versus_open_mythos.py
    gap          a prompt of 4,000 tokens that arrives among 16 decoders
    speculative  drafts after a few loops, at batch 1
    modes        deterministic or not; fp32, bf16 or int8 weights; 1, 8 and 32 requests

All text is greedy, so that every way must give the same tokens; how many do is printed. Ratios are
of medians over repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from engine_load import (
    GREEDY,
    Arrival,
    Served,
    poisson,
    serve,
    serve_in_batches,
    texts,
    ticker,
    writer,
)
from versus_open_mythos import our_model, their_model

import openmythos
from openmythos.inference.language_model import LanguageModel
from openmythos.inference.request import Request
from openmythos.inference.shipped import LANGUAGE_MODEL, REASONER, find_model
from openmythos.inference.thinking import Thinking
from openmythos.model.quantised import quantise
from openmythos.model.transformer import OpenMythos
from openmythos.tasks.rooms import HOUSE
from openmythos.training.machine import matmul_peak

DEPTHS, SHARES = (2, 4, 8, 16), (0.4, 0.3, 0.2, 0.1)
"""Loops that requests ask for, and how many do: 5.2 on average."""
DEEPEST = max(DEPTHS)

CPU = torch.device("cpu")

Figures = dict[str, Any]


def wanted_text(token_ids: tuple[int, ...], new: int, loops: int, **more: Any) -> Request:
    """A greedy request that writes exactly `new` tokens."""
    return Request(
        token_ids=token_ids,
        max_new_tokens=new,
        thinking=Thinking(loops=loops),
        sampling=GREEDY,
        stop_at_end=False,
        **more,
    )


def repeated(ways: dict[str, Callable[[], Served]], repeats: int) -> dict[str, list[Served]]:
    """Run each way in turn, so that all meet the same noise; a first round is not counted."""
    found: dict[str, list[Served]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            served = way()
            if turn:
                found[name].append(served)
    return found


def medians(runs: Sequence[Served]) -> dict[str, float]:
    """The median of each figure over repeats."""
    figures = [run.figures() for run in runs]
    return {name: statistics.median(f[name] for f in figures) for name in figures[0]}


def bound(model: OpenMythos, mean: float, most: int, keys: int) -> float:
    """How much faster than full depth a batch can be whose tokens take `mean` loops."""
    once, loop = model.flops(keys, 0, decoding=True), model.core.flops(keys, decoding=True)
    return (once + most * loop) / (once + mean * loop)


def equal_alone(lm: LanguageModel, served: Served) -> float:
    """The share of requests whose tokens are those that they give alone."""
    same = 0
    for arrival, token_ids in zip(served.arrivals, served.token_ids, strict=True):
        alone = serve(ticker(lm), [Arrival(0.0, arrival.request)])
        same += alone.token_ids[0] == token_ids
    return same / len(served.arrivals)


def measure_load(options: argparse.Namespace) -> Figures:
    """Mixed text: this engine, static batches, and one depth for all."""
    lm = openmythos.load(LANGUAGE_MODEL)
    random = np.random.default_rng([options.seed, 2])
    prompts = texts(lm, options.requests, options.seed)
    new = random.integers(16, 65, len(prompts)).tolist()
    loops = random.choice(DEPTHS, len(prompts), p=SHARES).tolist()
    mixed = [wanted_text(*each) for each in zip(prompts, new, loops, strict=True)]
    full = [wanted_text(p, n, DEEPEST) for p, n in zip(prompts, new, strict=True)]
    mixed_arrivals = poisson(mixed, options.rate, options.seed)
    full_arrivals = poisson(full, options.rate, options.seed)
    found = repeated(
        {
            "this engine": lambda: serve(ticker(lm), mixed_arrivals),
            "one depth for all": lambda: serve(ticker(lm), full_arrivals),
            "static batches": lambda: serve_in_batches(mixed_arrivals, writer(lm)),
        },
        options.repeats,
    )
    rows = {name: medians(runs) for name, runs in found.items()}
    ours = rows["this engine"]
    most = bound(lm.model, ours["loops_per_token"], DEEPEST, 64)
    ratio = ours["tokens_per_second"] / rows["one depth for all"]["tokens_per_second"]
    return {
        "rows": rows,
        "over one depth for all": ratio,
        "bound": most,
        "share of the bound": ratio / most,
        "over static batches": ours["tokens_per_second"]
        / rows["static batches"]["tokens_per_second"],
        "requests with the tokens they give alone": equal_alone(lm, found["this engine"][0]),
    }


class Numbers:
    """Stands for a tokenizer where tokens are no text."""

    vocab_size, end_id = HOUSE.vocab_size, -1

    class Stream:
        """Text of tokens, of which there is none."""

        def push(self, token_id: int) -> str:
            """Take a token."""
            del token_id
            return ""

        def finish(self) -> str:
            """End."""
            return ""

    def text_stream(self, after: Sequence[int] = ()) -> Numbers.Stream:
        """Return a stream that stays empty."""
        return self.Stream()


def measure_reasoner(options: argparse.Namespace) -> Figures:
    """Chains of 10 to 40 hops; each place of a prompt stops by the gate, or nowhere."""
    model = OpenMythos.from_pretrained(find_model(REASONER), dtype=torch.float32).eval()
    lm: Any = type("Solver", (), {"model": model, "tokenizer": Numbers()})()
    random = np.random.default_rng([options.seed, 3])
    most = 64

    def requests(halting: str) -> list[Request]:
        return [
            Request(
                token_ids=tuple(HOUSE.chains(source, 1, hops).token_ids[0].tolist()),
                max_new_tokens=1,
                thinking=Thinking(loops=most, halting=halting),  # type: ignore[arg-type]
                sampling=GREEDY,
                stop_at_end=False,
            )
            for source, hops in zip(sources(), hops_of, strict=True)
        ]

    def sources() -> list[np.random.Generator]:
        return [np.random.default_rng([options.seed, 4, n]) for n in range(len(hops_of))]

    hops_of = random.integers(10, 41, options.requests).tolist()
    answers = [
        int(HOUSE.chains(source, 1, hops).answers[0, -1])
        for source, hops in zip(sources(), hops_of, strict=True)
    ]
    # All at once: chains are short, and at a text's rate the engine would wait for them.
    loads = {name: [Arrival(0.0, r) for r in requests(name)] for name in ("gate", "none")}
    loops: dict[str, float] = {}

    def run(name: str) -> Served:
        engine = ticker(lm)
        served = serve(engine, loads[name])
        positions = sum(len(a.request.token_ids) for a in loads[name])
        loops[name] = engine.counts.row_loops / positions
        return served

    found = repeated({"gate": lambda: run("gate"), "none": lambda: run("none")}, options.repeats)
    seconds = {name: statistics.median(run.seconds for run in runs) for name, runs in found.items()}
    right = {
        name: statistics.fmean(
            given[0] == answer for given, answer in zip(runs[0].token_ids, answers, strict=True)
        )
        for name, runs in found.items()
    }
    most_gain = bound(model, loops["gate"], most, 16)
    return {
        "seconds": seconds,
        "right": right,
        "loops per place": loops,
        "over full depth": seconds["none"] / seconds["gate"],
        "bound": most_gain,
        "share of the bound": seconds["none"] / seconds["gate"] / most_gain,
    }


def measure_theirs(options: argparse.Namespace) -> Figures:
    """Open-mythos' own generate, greedy as far as it can be: equal requests, and a mixed load."""
    theirs = their_model("gqa").eval()
    ours = {name: solver(weights) for name, weights in OUR_WEIGHTS.items()}
    length, new = 128, 32
    found: Figures = {}
    for batch in (1, 8):
        prompts = torch.randint(0, 4000, (batch, length))
        arrivals = [Arrival(0.0, wanted_text(tuple(p.tolist()), new, 8)) for p in prompts]
        seconds: dict[str, list[float]] = {name: [] for name in (*ours, "theirs")}
        for turn in range(options.repeats + 1):
            took = {name: serve(ticker(lm), arrivals).seconds for name, lm in ours.items()}
            start = time.perf_counter()
            theirs.generate(prompts, max_new_tokens=new, n_loops=8, top_k=1)
            took["theirs"] = time.perf_counter() - start
            for name, each in took.items():
                if turn:
                    seconds[name].append(each)
        found[f"batch {batch}"] = over_theirs(
            {name: batch * new / statistics.median(s) for name, s in seconds.items()}
        )
        least = batch * least_operations(length, new) / matmul_peak(torch.float32, CPU)
        found[f"batch {batch}"]["ratio at the peak of fp32 products"] = (
            statistics.median(seconds["theirs"]) / least
        )
    load = mixed_numbers(options)

    def batches() -> Served:
        return serve_in_batches(load, lambda *batch: write_theirs(theirs, *batch))

    ways: dict[str, Callable[[], Served]] = {
        name: lambda lm=lm: serve(ticker(lm), load) for name, lm in ours.items()
    }
    runs = repeated({**ways, "theirs": batches}, options.repeats)
    speed = {name: medians(served)["tokens_per_second"] for name, served in runs.items()}
    return {**found, "load": over_theirs(speed)}


def least_operations(length: int, new: int) -> int:
    """Operations of one request at 8 loops, if no token had more than one key."""
    model = our_model("gqa")
    head = 2 * model.head.weight.numel()
    return (length + new) * (model.flops(1, 8) - head) + new * head


OUR_WEIGHTS: dict[str, Callable[[OpenMythos], OpenMythos]] = {
    "ours": lambda model: model,
    "ours, bf16": lambda model: model.bfloat16(),
    "ours, int8": quantise,
}


def solver(weights: Callable[[OpenMythos], OpenMythos]) -> LanguageModel:
    """The model of versus_open_mythos.py with its weights in another precision."""
    tokenizer = openmythos.load(LANGUAGE_MODEL).tokenizer
    return LanguageModel(weights(our_model("gqa").eval()), tokenizer)


def over_theirs(speed: dict[str, float]) -> Figures:
    """Tokens per second of each, and how many times theirs it is."""
    ratio = {name: value / speed["theirs"] for name, value in speed.items() if name != "theirs"}
    return {"tokens_per_second": speed, "ratio": ratio}


def mixed_numbers(options: argparse.Namespace) -> list[Arrival]:
    """A load as that of `load`, of numbers, with up to 8 loops."""
    random = np.random.default_rng([options.seed, 5])
    requests = []
    for length in random.integers(8, 97, options.requests).tolist():
        prompt = tuple(random.integers(0, 4000, length).tolist())
        loops = int(random.choice(DEPTHS, p=SHARES)) // 2
        requests.append(wanted_text(prompt, int(random.integers(16, 65)), loops))
    return poisson(requests, options.rate, options.seed)


def write_theirs(
    model: torch.nn.Module, token_ids: torch.Tensor, mask: torch.Tensor, new: int, loops: int
) -> Iterator[tuple[list[int], list[int]]]:
    """A batch in open-mythos, which knows no padding: every prompt is as long as the longest."""
    del mask
    written = model.generate(token_ids, max_new_tokens=new, n_loops=loops, top_k=1)
    for column in written[:, token_ids.shape[1] :].t().tolist():
        yield column, [loops] * len(column)


def measure_gap(options: argparse.Namespace) -> Figures:
    """A long prompt among decoders: the longest wait between two of their tokens."""
    shipped = openmythos.load(LANGUAGE_MODEL)
    lm = shipped
    if shipped.model.config.max_length < 4200:  # the same weights: rotary angles need no table
        model = OpenMythos(shipped.model.config.replace(max_length=8192))
        model.load_state_dict(
            {name: tensor.dequantize() if tensor.is_quantized else tensor.clone()
             for name, tensor in shipped.model.state_dict().items()}
        )  # fmt: skip
        lm = LanguageModel(model.eval(), shipped.tokenizer)
    prompts = texts(shipped, 17, options.seed)
    loops, new = 4, 160
    decoders = [Arrival(0.0, wanted_text(p[:16], new, loops)) for p in prompts[:16]]
    long = tuple((prompts[16] * 4000)[:4000])
    found = []
    for _ in range(options.repeats):
        served = serve(ticker(lm), [*decoders, Arrival(0.5, wanted_text(long, 1, loops))])
        gaps = [gap for tokens in served.tokens[:16] for gap in np.diff([at for at, _ in tokens])]
        # A token takes as many ticks as loops; a tick's work is what the prompt may not stretch.
        ticks = statistics.median(served.ticks)
        found.append((max(gaps), statistics.median(gaps), max(served.ticks), ticks))
    longest, usual, tick, ticks = (1e3 * statistics.median(x) for x in zip(*found, strict=True))
    return {
        "longest_gap_ms": longest,
        "median_gap_ms": usual,
        "longest_tick_ms": tick,
        "median_tick_ms": ticks,
        "longest gap in median gaps": longest / usual,
        "longest gap in median ticks": longest / ticks,
    }


def measure_speculative(options: argparse.Namespace) -> Figures:
    """One request at a time, drafted after a few loops, verified by all."""
    lm = openmythos.load(LANGUAGE_MODEL)
    prompts = texts(lm, 4, options.seed)
    found: Figures = {}
    ways: dict[str, int | None] = {"no drafts": None, "1": 1, "2": 2, "3": 3, "4": 4}
    accepted: dict[str, float] = {}

    def run(name: str, loops: int) -> Served:
        engine = ticker(lm)
        requests = [wanted_text(p, 48, loops, draft_loops=ways[name]) for p in prompts]
        parts = [serve(engine, [Arrival(0.0, request)]) for request in requests]
        if engine.counts.drafted_tokens:
            accepted[name] = engine.counts.accepted_tokens / engine.counts.drafted_tokens
        shift = np.cumsum([0.0, *(part.seconds for part in parts[:-1])])
        moved = [
            [(at + by, event) for at, event in part.tokens[0]]
            for part, by in zip(parts, shift, strict=True)
        ]
        return Served([Arrival(0.0, request) for request in requests], moved)

    for loops in (8, 16):
        served = repeated(
            {name: lambda name=name, loops=loops: run(name, loops) for name in ways},
            options.repeats,
        )
        speed = {name: medians(runs)["tokens_per_second"] for name, runs in served.items()}
        same = {
            name: runs[0].token_ids == served["no drafts"][0].token_ids
            for name, runs in served.items()
        }
        found[f"{loops} loops"] = {
            "tokens_per_second": speed,
            "ratio": {name: value / speed["no drafts"] for name, value in speed.items()},
            "accepted": dict(accepted),
            "same tokens": same,
        }
    return found


def measure_modes(options: argparse.Namespace) -> Figures:
    """Tokens per second, deterministic or not, and with fp32, bf16 or int8 weights."""
    int8 = openmythos.load(LANGUAGE_MODEL, weights="int8")
    fp32 = openmythos.load(LANGUAGE_MODEL, weights="fp32")
    bf16 = openmythos.load(LANGUAGE_MODEL, weights="bf16")
    prompts = texts(int8, 32, options.seed)
    found: Figures = {}
    for count in (1, 8, 32):
        arrivals = [Arrival(0.0, wanted_text(p, 32, 6)) for p in prompts[:count]]
        found[f"{count} requests"] = {
            name: medians(runs)["tokens_per_second"]
            for name, runs in repeated(
                {
                    "fp32, deterministic": lambda a=arrivals: serve(ticker(fp32), a),
                    "fp32": lambda a=arrivals: serve(ticker(fp32, deterministic=False), a),
                    "bf16, deterministic": lambda a=arrivals: serve(ticker(bf16), a),
                    "int8, deterministic": lambda a=arrivals: serve(ticker(int8), a),
                },
                options.repeats,
            ).items()
        }
    return found


PARTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "load": measure_load,
    "reasoner": measure_reasoner,
    "theirs": measure_theirs,
    "gap": measure_gap,
    "speculative": measure_speculative,
    "modes": measure_modes,
}


def show(figures: Figures, indent: str = "") -> None:
    """Print nested figures, a line each."""
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:", flush=True)
            show(value, indent + "  ")
        else:
            shown = f"{value:,.2f}" if isinstance(value, float) else value
            print(f"{indent}{name}: {shown}", flush=True)


def main() -> None:
    """Measure the parts asked for and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rate", type=float, default=40.0, help="arrivals a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for name in ("repeats", "requests", "threads"):
        if getattr(options, name) < 1:
            sys.exit(f"{name}={getattr(options, name)} must be 1 or more")
    if options.rate <= 0:
        sys.exit(f"rate={options.rate} must be above 0")
    torch.set_num_threads(options.threads)
    found = {}
    for part in options.part:
        found[part] = PARTS[part](options)
        if not options.json:
            show({part: found[part]})
    if options.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
