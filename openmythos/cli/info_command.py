"""Show what a model costs: parameters, operations, cache, memory. Without a name, compare all.

Examples:
    openmythos info
    openmythos info 1t --loops 1 16 64
    openmythos info runs/nano --json

MODEL is a preset, a model that comes with the package, or the folder of a model, of a training run
or of one of its checkpoints.
Everything is counted on the model itself, built without memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from openmythos.cli.named import model_folder
from openmythos.config import MythosConfig
from openmythos.errors import InputError
from openmythos.numbers import check_depths
from openmythos.scales import SCALES
from openmythos.training.run import config_in

if TYPE_CHECKING:
    from openmythos.model.accounting import Account
    from openmythos.training.memory import TrainingBytes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of `openmythos info`."""

    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = None
    """A preset, a model that comes with the package, or the folder of a model, of a training run or
    of one of its checkpoints. Default: compare all presets."""

    loops: tuple[int, ...] | None = None
    """Depths to count operations at. Default: 1, and half, all and twice the mean loops; the
    comparison shows the mean alone."""

    keys: int = 1024
    """Keys that a token sees where operations are counted; at most max_length."""

    json: bool = False
    """Print JSON."""


def run(settings: Settings) -> None:
    """Count and print."""
    if settings.loops is not None:
        check_depths(settings.loops)
    if settings.loops is not None and settings.model is None and not settings.json:
        raise InputError("loops must be left out of the comparison: it shows the mean loops")
    if settings.keys < 1:
        raise InputError(f"keys={settings.keys} must be 1 or more")
    names = list(SCALES) if settings.model is None else [settings.model]
    costs = [_cost(name, settings) for name in names]
    if settings.json:
        reports = [_as_json(*cost) for cost in costs]
        print(json.dumps(reports if settings.model is None else reports[0]))
    elif settings.model is None:
        print(_comparison(costs, settings.keys))
    else:
        print(_page(*costs[0]))


def find_config(name: str) -> MythosConfig:
    """Return the config of a preset, or of a model, a run or one of its checkpoints.

    Raises:
        InputError: there is no such preset and no such folder.
        CheckpointError: the folder holds no model, or a damaged one.
    """
    if name in SCALES:
        return MythosConfig.preset(name)
    return config_in(model_folder(name))


Cost = tuple[str, MythosConfig, "Account", "TrainingBytes"]


def _cost(name: str, settings: Settings) -> Cost:
    from openmythos.model.accounting import account, on_meta
    from openmythos.training.memory import training_bytes

    config = find_config(name)
    counted = account(config, loops=settings.loops, keys=settings.keys)
    return name, config, counted, training_bytes(on_meta(config))


def _as_json(
    name: str, config: MythosConfig, account: Account, training: TrainingBytes
) -> dict[str, Any]:
    return {
        "name": name,
        "config": dataclasses.asdict(config),
        "parameters": {"total": account.total, "active": account.active, **account.parts},
        "flops_per_token": {"keys": account.keys, "forward_by_loops": account.flops},
        "cache_bytes_per_token": account.cache_bytes,
        "training_bytes": {**training._asdict(), "total": training.total},
        "serving_bytes": {
            "weights": account.serving_bytes,
            **{
                f"cache_{policy}": size * config.max_length
                for policy, size in account.cache_bytes.items()
            },
        },
    }


def _page(name: str, config: MythosConfig, account: Account, training: TrainingBytes) -> str:
    return "\n".join(
        [
            f"{name}: {_shape(config)}",
            *_parameters(config, account),
            *_operations(account),
            *_cache(config, account),
            *_memory(config, account, training),
        ]
    )


def _shape(config: MythosConfig) -> str:
    core = f"{config.core_layers} core layers run {config.mean_loops} times on average"
    return (
        f"hidden {config.hidden_size}, vocab {config.vocab_size}, at most {config.max_length:,} "
        f"tokens;\n  {config.prelude_layers} prelude layers, {core}, {config.coda_layers} coda "
        "layers"
    )


def _parameters(config: MythosConfig, account: Account) -> list[str]:
    notes = {"embedding": "also the head" if config.tie_head else ""}
    if config.experts:
        notes["core"] = "with routers and shared experts"
        notes["experts"] = f"{config.experts} a layer, of which a token takes " + str(
            config.experts_per_token
        )
    lines = ["", f"parameters    {_count(account.total):>10}"]
    lines.append(f"  active      {_count(account.active):>10}  without the experts not chosen")
    for part, count in account.parts.items():
        if count:
            lines.append(f"  {part:<12}{_count(count):>10}  {notes.get(part, '')}".rstrip())
    return lines


def _operations(account: Account) -> list[str]:
    lines = ["", f"operations per token, forward, with {account.keys:,} keys in sight"]
    lines += [f"  {loops:>4} loops  {_si(count):>10}FLOP" for loops, count in account.flops.items()]
    return [*lines, "  training takes about three times as many"]


def _cache(config: MythosConfig, account: Account) -> list[str]:
    lines = ["", "cache per token, bf16", f"  {'':<36}{'slot per loop':>14}{'last loop only':>16}"]
    sizes = {
        "gqa": f"gqa, {config.kv_heads} heads of {config.head_dim}",
        "mla": f"mla, latent {config.kv_latent} + rope {config.rope_dim}",
    }
    every, last = (_bytes(account.cache_bytes[policy]) for policy in ("per_loop", "last"))
    lines.append(f"  {sizes[config.attention]:<36}{every:>14}{last:>16}")
    return [*lines, f"  slots are {config.mean_loops}, the mean loops"]


def _memory(config: MythosConfig, account: Account, training: TrainingBytes) -> list[str]:
    own, length = account.cache_bytes, config.max_length
    every, last = (_bytes(own[policy] * length) for policy in ("per_loop", "last"))
    weights, gradients, optimizer = map(_bytes, training)
    rows = {
        f"memory to train in fp32, without activations  {_bytes(training.total):>10}": (
            f"weights {weights}, gradients {gradients}, optimizer {optimizer} (Muon 4 bytes a "
            "parameter, AdamW 8)"
        ),
        f"memory to serve in bf16, weights              {_bytes(account.serving_bytes):>10}": (
            f"and a cache of {length:,} tokens: {every}, or {last} with the last loop only"
        ),
    }
    return ["", *(line for row, note in rows.items() for line in (row, f"  {note}"))]


COMPARED = """\
layers: prelude + core x mean loops + coda. FLOP/token: forward, at the mean loops, at most {keys:,}
keys in sight. cache/token: bf16, a slot for each of the mean loops; last only: for the last loop.
to train: fp32 weights, gradients and optimizer, without activations. to serve: bf16 weights and
one sequence of max_length with a slot per loop."""


def _comparison(costs: Sequence[Cost], keys: int) -> str:
    titles = ["preset", "total", "active", "attention", "layers", "max_length", "FLOP/token"]
    titles += ["cache/token", "last only", "to train", "to serve"]
    rows = [titles, *(_row(*cost) for cost in costs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "", COMPARED.format(keys=keys)])


def _row(name: str, config: MythosConfig, account: Account, training: TrainingBytes) -> list[str]:
    own, core = account.cache_bytes, f"{config.core_layers} x {config.mean_loops}"
    return [
        name,
        _count(account.total),
        _count(account.active),
        config.attention,
        f"{config.prelude_layers} + {core} + {config.coda_layers}",
        f"{config.max_length:,}",
        _si(account.flops[config.mean_loops]),
        _bytes(own["per_loop"]),
        _bytes(own["last"]),
        _bytes(training.total),
        _bytes(account.serving_bytes + own["per_loop"] * config.max_length),
    ]


def _si(count: float, units: Sequence[str] = ("", "k", "M", "G", "T", "P")) -> str:
    """A count in three digits and the unit of its thousands."""
    power = 0
    while count >= 999.5 and power + 1 < len(units):
        count, power = count / 1000, power + 1
    digits = 0 if power == 0 else max(0, 3 - len(str(int(count))))
    return f"{count:.{digits}f} {units[power]}".rstrip()


def _count(parameters: int) -> str:
    """Parameters are counted in billions, not in giga."""
    return _si(parameters, ("", "k", "M", "B", "T"))


def _bytes(count: float) -> str:
    text = _si(count)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"
