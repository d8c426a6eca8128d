"""Trains a model on labelled batches: the short trainings that the claims rest on.

A batch is a pure function of the step, so a checkpoint needs only that, weights and optimizers, and
an interrupted training goes on to the same end.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from openmythos.config import MythosConfig
from openmythos.errors import CheckpointError
from openmythos.evidence.cells import as_json
from openmythos.evidence.recorded import RecordedPasses
from openmythos.model.accounting import training_flops
from openmythos.model.files import fill, storable
from openmythos.model.transformer import OpenMythos
from openmythos.training import checkpoint
from openmythos.training.compiled import compiled_layers, compiling_pays
from openmythos.training.machine import default_device
from openmythos.training.optimizer import Optimizers, build_optimizers
from openmythos.training.settings import OptimizerConfig, schedule

IGNORE = -100
"""Target of a place that is not asked about."""


class Batch(NamedTuple):
    """What one step learns from."""

    token_ids: Int[Tensor, "batch sequence"]
    targets: Int[Tensor, "batch sequence"]
    """The wanted token at each place, or `IGNORE`."""
    loops: int | Tensor
    """How many the step runs: one number, or one for each token."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        loops = self.loops.to(device) if isinstance(self.loops, Tensor) else self.loops
        return Batch(self.token_ids.to(device), self.targets.to(device), loops)


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """One training of a claim."""

    steps: int
    backprop_loops: int | None = None
    """Last loops that carry gradient; None: all."""
    seed: int = 0
    save_every: int = 100
    report_every: int = 50
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


Report = Callable[[int, float], None]
"""Told of the steps taken and the mean loss since the last report, in nats."""

Loss = Callable[[OpenMythos, Batch], tuple[Float[Tensor, ""], Tensor | None]]
"""A batch's loss in nats, and the loads of a core with experts."""

Watch = Callable[[int, float, float], bool]
"""Told of the steps taken, the last one's loss in nats and its gradient's norm before clipping;
says whether to go on."""


def fit(
    model: OpenMythos,
    batch: Callable[[int], Batch],
    config: FitConfig,
    folder: Path,
    *,
    loss: Loss | None = None,
    report: Report | None = None,
    watch: Watch | None = None,
    frozen: Sequence[str] = (),
    text: str = "",
) -> float:
    """Train `model` in place, from the newest checkpoint of `folder` if there is one.

    It is trained, and stays, on the GPU where there is one.

    Args:
        model: as initialised.
        batch: gives the batch of a step, from 0.
        config: the training.
        folder: holds the checkpoints; the last one stays there.
        loss: of a batch, in nats, and the experts' loads; default: the mean of the places asked.
        report: progress.
        watch: sees every step, and may end the training before its last one.
        frozen: parts of the model that stay as initialised, each a word of the dotted names of
            their parameters: `router`.
        text: fingerprint of what the batches are made of, where that may change; a checkpoint of
            another text is refused.

    Returns:
        The seconds that all steps took, those before an interruption included.

    Raises:
        CheckpointError: the folder holds a training with other settings, or a damaged one.
    """
    torch.set_flush_denormal(True)
    device = default_device()
    products = _tensor_cores if device.type == "cuda" else nullcontext
    model.to(device)
    for name, parameter in model.named_parameters():
        held = name.startswith("core.gate.") or not set(name.split(".")).isdisjoint(frozen)
        parameter.requires_grad_(not held)
    optimizers = build_optimizers(
        model.named_parameters(), config.optimizer, fused_splits=model.fused_splits()
    )
    asked = _asked(model, config, frozen, text)
    step, seconds = 0, 0.0
    losses: list[float] = []  # since the last report
    if (newest := checkpoint.latest(folder)) is not None:
        found = checkpoint.load(newest)
        if _with_defaults(found.state["asked"]) != asked:
            raise CheckpointError(
                f"folder={folder} must hold a training with these settings: choose another folder"
            )
        fill(model, found.tensors["model"], str(newest))
        optimizers.load_state_tensors(found.tensors["optimizer"])
        step, seconds = found.step, found.state["seconds"]
        losses = list(found.state.get("losses", []))
    started = time.perf_counter() - seconds
    gradients = _gradients(model, config, optimizers, loss, watched=watch is not None)
    if step < config.steps:
        layers = _layers(model, config, batch(0))
    model.train()
    while step < config.steps:
        optimizers.set_lr(schedule(step, config.steps, config.optimizer))
        with layers(), products():
            nats, loads = gradients(batch(step))
        norm = optimizers.step()
        if loads is not None and math.isfinite(norm):
            model.core.rebalance(loads)
        losses.append(float(nats.detach()))
        step += 1
        if watch is not None and not watch(step, losses[-1], norm):
            break
        if step % config.report_every == 0 or step == config.steps:
            if report is not None:
                report(step, float(np.mean(losses)))
            losses = []
        if step % config.save_every == 0 or step == config.steps:
            seconds = time.perf_counter() - started
            state = {"asked": asked, "seconds": seconds, "losses": losses}
            tensors = {"model": storable(model), "optimizer": optimizers.state_tensors()}
            checkpoint.save(folder, step, tensors, state, keep=1)
    model.eval()
    return time.perf_counter() - started


def _gradients(
    model: OpenMythos,
    config: FitConfig,
    optimizers: Optimizers,
    loss: Loss | None,
    *,
    watched: bool,
) -> Callable[[Batch], tuple[Tensor, Tensor | None]]:
    """Return what computes a batch's loss, the gradients and the experts' loads.

    `watched` trainings may have hooks, which a recorded pass would not call.
    """
    device, window = model.embed.weight.device, config.backprop_loops
    chosen = loss or partial(_loss, window=window)

    def computed(batch: Batch) -> tuple[Tensor, Tensor | None]:
        optimizers.zero_grad()
        nats, loads = chosen(model, batch.to(device))
        nats.backward()
        return nats, loads

    if loss is not None or watched or device.type != "cuda" or model.config.experts:
        return computed
    recorded = RecordedPasses(model, partial(_mean_loss, model, window))

    def replayed(batch: Batch) -> tuple[Tensor, Tensor | None]:
        if not isinstance(batch.loops, int):
            return computed(batch)
        return recorded(batch.token_ids, batch.targets, batch.loops), None

    return replayed


def _asked(
    model: OpenMythos, config: FitConfig, frozen: Sequence[str], text: str
) -> dict[str, Any]:
    """What a checkpoint must have been made with."""
    fields = as_json(dataclasses.asdict(config))
    asked: dict[str, Any] = {"model": json.loads(model.config.to_json()), "fit": fields}
    if frozen:
        asked["frozen"] = list(frozen)
    if text:
        asked["text"] = text
    return asked


def _with_defaults(asked: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, with the fields of now: those since added, and none of those removed."""
    model = MythosConfig.from_json(json.dumps(asked["model"]))
    known = {field.name for field in dataclasses.fields(FitConfig)}
    fitted = {name: value for name, value in asked["fit"].items() if name in known}
    return {**asked, "model": json.loads(model.to_json()), "fit": fitted}


def _layers(
    model: OpenMythos, config: FitConfig, first: Batch
) -> Callable[[], AbstractContextManager[None]]:
    """Compile the layers where the training is long; return what makes contexts for its steps."""
    tokens, length = first.token_ids.numel(), first.token_ids.shape[-1]
    loops = round(float(torch.as_tensor(first.loops).float().mean()))
    flops = training_flops(model, config.steps * tokens, length // 2, loops)
    if not compiling_pays("auto", flops, model.embed.weight.device):
        return nullcontext
    return compiled_layers(model, sizes_vary=isinstance(first.loops, Tensor))


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Take fp32 products in TF32, which is several times faster and exact enough to learn by."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _loss(
    model: OpenMythos, batch: Batch, window: int | None
) -> tuple[Float[Tensor, ""], Tensor | None]:
    """Mean loss in nats of the places that are asked about, and the experts' loads."""
    out = model(batch.token_ids, batch.loops, backprop_loops=window)
    return _mean_of(out.logits, batch.targets), out.loads


def _mean_loss(
    model: OpenMythos, window: int | None, token_ids: Tensor, targets: Tensor, loops: int
) -> Float[Tensor, ""]:
    """As `_loss`, of a dense model."""
    return _mean_of(model(token_ids, loops, backprop_loops=window).logits, targets)


def _mean_of(logits: Tensor, targets: Tensor) -> Float[Tensor, ""]:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)
