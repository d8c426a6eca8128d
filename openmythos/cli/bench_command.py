"""Measure this machine and a model's speed on it.

Examples:
    openmythos bench
    openmythos bench small --loops 1 8 --repeats 3
    openmythos bench runs/nano --json

MODEL is a preset, a model in the package, or the folder of a model or run. Measured are the peak
of matrix products, training steps, prompts read (prefill) and tokens written (decode) at several
depths, in interleaved rounds, with one CPU thread and with all. Shown are medians at the better
number of threads. Other load on the machine slows everything down: let it rest.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from openmythos.cli.named import model_folder
from openmythos.config import WeightsChoice
from openmythos.errors import InputError
from openmythos.scales import SCALES
from openmythos.training.threads import check_threads

if TYPE_CHECKING:
    from openmythos.model.transformer import OpenMythos
    from openmythos.speed import Bench


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of `openmythos bench`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = "nano"
    """A preset, a model that comes with the package, or the folder of a model or training run."""

    device: str | None = None
    """Where it runs, as torch names it: cpu, cuda, cuda:1, mps. Default: a GPU where there is
    one."""

    weights: WeightsChoice = "file"
    """What the weights are where prompts are read and tokens written, as in `openmythos generate`;
    a preset's are fp32 then. Training is measured with fp32 weights."""

    loops: tuple[int, ...] = (1, 4, 16)
    """Depths of prefill and decode; training runs at the mean loops."""

    batches: tuple[int, ...] = (1, 8)
    """Sequences at once in prefill and decode."""

    length: int | None = None
    """Tokens of a prompt, at most half of the model's max_length. Default: 128, or that half."""

    threads: tuple[int, ...] | None = None
    """Numbers of CPU threads to try. Default: 1 and all cores."""

    repeats: int = 5
    """Rounds, of which the median counts."""

    json: bool = False
    """Print JSON."""


def run(settings: Settings) -> None:
    """Measure and print."""
    for name in ("loops", "batches", "threads"):
        values = getattr(settings, name)
        if values is not None and min(values, default=0) < 1:
            raise InputError(f"{name}={values} must hold integers of 1 or more")
    for name in ("length", "repeats"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be 1 or more")
    for count in settings.threads or ():
        check_threads(count)
    from openmythos.speed import bench

    model = _model(settings)

    def report(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\rround {done} of {settings.repeats}", end="", file=sys.stderr, flush=True)

    result = bench(
        model,
        loops=settings.loops,
        batches=settings.batches,
        length=settings.length,
        threads=settings.threads,
        repeats=settings.repeats,
        report=report,
    )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if settings.json:
        print(json.dumps({"model": settings.model, **dataclasses.asdict(result)}))
    else:
        print(_table(settings.model, result))


def _model(settings: Settings) -> OpenMythos:
    from openmythos.inference.precision import find_device, with_weights
    from openmythos.training.machine import default_device

    name, weights = settings.model, settings.weights
    place = find_device(settings.device or default_device(), weights)
    if name in SCALES:
        from openmythos.config import MythosConfig
        from openmythos.model.transformer import OpenMythos
        from openmythos.training.memory import check_fits

        config = MythosConfig.preset(name)
        check_fits(config)
        return with_weights(OpenMythos(config).eval().to(place), weights)
    from openmythos.inference.language_model import load

    return load(model_folder(name), weights, place).model


def _table(name: str, result: Bench) -> str:
    peaks = ", ".join(f"{kind} {peak / 1e9:,.0f} GFLOP/s" for kind, peak in result.peaks.items())
    lines = [
        f"matrix products: {peaks}",
        f"training in {result.machine.precision}: {result.machine.reason}",
        f"prefill and decode with {result.weights} weights",
        "",
        f"{name:<26}{'loops':>6}{'tokens/s':>12}{'of peak':>9}{'threads':>9}",
    ]
    words = {"training": "training, {} x {}", "prefill": "prefill, {} x {}"}
    words["decode"] = "decode, {} after {}"
    for speed in result.speeds:
        task = words[speed.task].format(speed.batch, speed.length)
        lines.append(
            f"{task:<26}{speed.loops:>6}{speed.tokens_per_second:>12,.0f}"
            f"{speed.share_of_peak:>9.1%}{speed.threads:>9}"
        )
    return "\n".join(lines)
