"""Models of facts and chains of them: how they are trained, and what is asked of them.

A batch has single facts, of all that are trained, and chains of those that chains may use. With
`stairs`, the answer after n hops is asked for only where at least n loops (or layers) run, and few
loops are drawn as often as many: a fact must then be known after one loop. Without, a model may
take all its loops over a fact it never has to go on from, and then knows it too late for a chain.

The loop that goes on from an answer must find in it what it finds in the entity itself. Where the
state is handed on, nothing asks for that of a fact that is only ever asked alone; where the answer
is handed on, it is so by construction.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from openmythos.config import InjectionKind, MythosConfig
from openmythos.errors import CheckpointError
from openmythos.evidence.cells import Say, as_json
from openmythos.evidence.fact_models import HandsOn, StepByStep
from openmythos.evidence.fit import IGNORE, Batch, FitConfig, fit
from openmythos.evidence.plain import PLAIN, trained_parameters
from openmythos.files import write_atomically
from openmythos.model.accounting import training_flops
from openmythos.model.transformer import OpenMythos
from openmythos.tasks.facts import FactTask, Kind, Pairs
from openmythos.tasks.hops import Chains
from openmythos.training.settings import OptimizerConfig

COURSE_FILE = "course.json"
Shares = dict[str, float]
"""Share of right answers by the name of the question."""


@dataclass(frozen=True, kw_only=True)
class FactTraining:
    """One model of one graph's facts."""

    entities: int = 50
    relations: int = 20
    alone: float = 0.2
    later: int = 50
    apart: float = 0.1
    hops: int = 4
    """Of every training chain."""

    core_layers: int = 2
    prelude_layers: int = 0
    plain_layers: int = 0
    """Layers of a plain transformer instead: no loop, no injection."""
    injection: InjectionKind = "lti"
    hands_on: HandsOn = "state"
    """What each loop, or layer of a plain one, hands on to the next."""
    hidden_size: int = 96
    feed_forward_size: int = 256

    loops: tuple[int, int] = (4, 7)
    """Fewest and most loops, or layers of a plain one; each step draws a number between."""
    stairs: bool = False
    """Ask for the answer after a hop only where as many loops run, or more."""
    batch_size: int = 160
    lone_share: float = 0.3
    """Share of each batch that are single facts."""
    waits: bool = False
    """Put no-ops before or behind the relation of each single fact, at random places."""
    steps: int = 4000
    adam_lr: float = 2e-3
    weight_decay: float = 0.1
    added_steps: int = 300
    """Steps that learn the facts added afterwards, alone."""
    measure_every: int = 100
    """Steps between measurements during training."""
    questions: int = 1000
    """Chains of each kind in the last measurement."""
    seed: int = 0
    """Of the graph, the weights and the batches."""

    @cached_property
    def task(self) -> FactTask:
        """The graph."""
        return FactTask(
            entities=self.entities,
            relations=self.relations,
            alone=self.alone,
            later=self.later,
            apart=self.apart,
            seed=self.seed,
        )

    @property
    def config(self) -> MythosConfig:
        """The model's shape: all layers in the loop, or a prelude for the control."""
        shape = {**PLAIN, "core_layers": self.plain_layers or self.core_layers}
        if not self.plain_layers:
            shape["prelude_layers"] = self.prelude_layers
            shape["mean_loops"] = max(1, sum(self.loops) // 2)
            shape["injection"] = self.injection
            shape["h0"] = "e" if self.injection == "none" else "zeros"
        return MythosConfig(
            vocab_size=self.task.vocab_size,
            hidden_size=self.hidden_size,
            feed_forward_size=self.feed_forward_size,
            num_heads=4,
            max_length=64,
            feed_forward="relu2",
            out_init=0.0,
            **shape,
        )

    @property
    def depth(self) -> int:
        """Loops or layers at which answers are read: the most of training."""
        return self.loops[1]

    def fit_config(self, steps: int, rate: float) -> FitConfig:
        """How it is trained."""
        optimizer = OptimizerConfig(
            matrices="adamw", adam_lr=rate, weight_decay=self.weight_decay, warmup_steps=100
        )
        return FitConfig(
            steps=steps,
            seed=self.seed,
            report_every=self.measure_every,
            optimizer=optimizer,
        )

    def new_model(self) -> OpenMythos:
        """Return the model as initialised."""
        untied = self.plain_layers > 0
        if untied or self.hands_on != "state":
            return StepByStep(self.config, seed=self.seed, untied=untied, hands_on=self.hands_on)
        return OpenMythos(self.config, seed=self.seed)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step: single facts first, then chains."""
        random = np.random.default_rng([self.seed, 3, step])
        count = round(self.lone_share * self.batch_size)
        lone = self._lone(random, count, "chained", "alone")
        return self._packed(random, [lone, self._chains(random, self.batch_size - count)])

    def added_batch(self, step: int, *, rehearse: bool) -> Batch:
        """Return a batch with the facts added afterwards, each alone.

        Args:
            step: of the training that adds them.
            rehearse: give three quarters of the batch to what was trained before.
        """
        random = np.random.default_rng([self.seed, 4, step])
        count = self.batch_size // 4 if rehearse else self.batch_size
        parts = [self._lone(random, count, "later")]
        if rehearse:
            old = self.batch_size - count
            lone = round(self.lone_share * old)
            parts.append(self._lone(random, lone, "chained", "alone"))
            parts.append(self._chains(random, old - lone))
        return self._packed(random, parts)

    def _lone(self, random: np.random.Generator, count: int, *kinds: Kind) -> Chains:
        """Draw single facts, each as often."""
        lone = self.task.lone(*kinds)
        rows = random.integers(0, len(lone.token_ids), count)
        drawn = Chains(*(part[rows] for part in lone))
        return self.task.waiting(random, drawn, self.hops) if self.waits else drawn

    def _chains(self, random: np.random.Generator, count: int) -> Chains:
        """Draw training chains."""
        kind: Kind = "chained"
        return self.task.chains(random, count, (kind,) * self.hops)

    def _packed(self, random: np.random.Generator, parts: Sequence[Chains]) -> Batch:
        """Put chains of several lengths into one batch, the shorter ones filled up."""
        rows, length = sum(len(part.token_ids) for part in parts), self.hops + 1
        token_ids = np.full((rows, length), self.task.no_op, dtype=np.int64)
        targets = np.full((rows, length), IGNORE, dtype=np.int64)
        first = 0
        for part in parts:
            count, width = part.token_ids.shape
            token_ids[first : first + count, :width] = part.token_ids
            targets[first : first + count, :width] = part.answers
            first += count
        loops = int(random.integers(self.loops[0], self.loops[1] + 1))
        if self.stairs:
            targets[:, loops + 1 :] = IGNORE
        return Batch(torch.from_numpy(token_ids), torch.from_numpy(targets), loops)

    def train(self, folder: Path, say: Say) -> tuple[OpenMythos, dict[str, Any]]:
        """Train, or go on training; return the model, what it took, and its course."""
        model = self.new_model()
        course = _read_course(folder / COURSE_FILE)

        def report(step: int, loss: float) -> None:
            share = right(model, self.task, min(self.questions, 300), [self.depth], COURSE)
            course[str(step)] = {"loss": loss} | {
                name: by_depth[self.depth] for name, by_depth in share.items()
            }
            write_atomically(folder / COURSE_FILE, json.dumps(course).encode())
            now = course[str(step)]
            say(
                f"step {step} of {self.steps}, loss {loss:.3f}, facts {now['alone-1']:.2f}, "
                f"chains {now['chained-2']:.2f}, of facts seen alone {now['alone-2']:.2f}"
            )

        fitted = self.fit_config(self.steps, self.adam_lr)
        seconds = fit(model, self.batch, fitted, folder, report=report)
        return model, {
            "parameters": trained_parameters(model),
            "flops": self.training_flops(model),
            "training_seconds": seconds,
            "course": course,
        }

    def add(
        self, model: OpenMythos, folder: Path, *, rehearse: bool
    ) -> tuple[OpenMythos, dict[str, Shares]]:
        """Teach a copy the added facts, alone; return it, and shares before and after."""
        taught = copy.deepcopy(model)
        before = self._after_adding(model)
        fitted = self.fit_config(self.added_steps, self.adam_lr / 4)
        fit(taught, lambda step: self.added_batch(step, rehearse=rehearse), fitted, folder)
        return taught, {"before": before, "after": self._after_adding(taught)}

    def _after_adding(self, model: OpenMythos) -> Shares:
        shares = right(model, self.task, self.questions, [self.depth], ADDED)
        return {name: by_depth[self.depth] for name, by_depth in shares.items()}

    def training_flops(self, model: OpenMythos) -> float:
        """Floating-point operations of the training, with the loops it has on average."""
        tokens, depth = self.steps * self.batch_size * (self.hops + 1), sum(self.loops) / 2
        share = depth / self.plain_layers if self.plain_layers else depth
        flops = training_flops(model, tokens, (self.hops + 2) // 2, share)
        if self.hands_on != "state":  # each loop reads out, and looks its answer up
            flops += 3 * tokens * depth * 4 * self.hidden_size * self.task.vocab_size
        return flops

    def as_json(self) -> dict[str, Any]:
        """Return the settings as a cell keeps them."""
        optimizer = self.fit_config(self.steps, self.adam_lr).optimizer
        return as_json({**dataclasses.asdict(self), "optimizer": dataclasses.asdict(optimizer)})


Kinds = tuple[Kind, ...]
Question = tuple[Kinds, Pairs]
"""The kind of each hop's fact, and which relations follow each other."""

COURSE: dict[str, Question] = {
    "chained-1": (("chained",), "usual"),
    "alone-1": (("alone",), "usual"),
    "chained-2": (("chained",) * 2, "usual"),
    "chained-4": (("chained",) * 4, "usual"),
    "apart-2": (("chained",) * 2, "apart"),
    "alone-2": (("alone",) * 2, "usual"),
    "alone-3": (("alone",) * 3, "usual"),
    "alone-4": (("alone",) * 4, "usual"),
}
ADDED: dict[str, Question] = {
    "later-1": (("later",), "usual"),
    "later-chained": (("later", "chained"), "usual"),
    "chained-later": (("chained", "later"), "usual"),
    "chained-2": (("chained",) * 2, "usual"),
    "alone-1": (("alone",), "usual"),
    "alone-2": (("alone",) * 2, "usual"),
}


def right(
    model: OpenMythos,
    task: FactTask,
    count: int,
    depths: Sequence[int],
    questions: dict[str, Question],
) -> dict[str, dict[int, float]]:
    """Return the share of right answers to each question, for each number of loops.

    Single facts are all asked, of chains `count`.
    """
    found = {}
    for number, (name, (kinds, pairs)) in enumerate(questions.items()):
        random = np.random.default_rng([task.seed, 5, number])
        asked = task.lone(*kinds) if len(kinds) == 1 else task.chains(random, count, kinds, pairs)
        hits = read_entities(model, task, asked, max(depths)) == _answers(asked)
        found[name] = {depth: float(hits[depth - 1, :, -1].double().mean()) for depth in depths}
    return found


def lens(model: OpenMythos, task: FactTask, count: int, depth: int) -> dict[str, Any]:
    """Read every state as if it were the last (the logit lens), on chains of two hops.

    Returns:
        By kind of chain: the share of chains whose bridge, the entity after the first hop, is what
        the first relation's place says after each loop, and whose answer the second's says.
    """
    kinds: dict[str, Kinds] = {"chained": ("chained",) * 2, "alone": ("alone",) * 2}
    found = {}
    for name, kind in kinds.items():
        asked = task.chains(np.random.default_rng([task.seed, 6]), count, kind)
        shares = (read_entities(model, task, asked, depth) == _answers(asked)).double().mean(1)
        found[name] = {"bridge": shares[:, 1].tolist(), "answer": shares[:, 2].tolist()}
    return found


@torch.inference_mode()
def read_entities(
    model: OpenMythos, task: FactTask, asked: Chains, depth: int
) -> Int[Tensor, "loops batch sequence"]:
    """Return the entity that each place names after each loop."""
    token_ids = torch.from_numpy(asked.token_ids).to(model.embed.weight.device)
    out = model(token_ids, depth, return_states=True)
    assert out.states is not None
    named = [model.decode(h)[..., : task.entities].argmax(-1) for h in out.states]
    return torch.stack(named).cpu()


def _answers(asked: Chains) -> Tensor:
    return torch.from_numpy(asked.answers)


def _read_course(path: Path) -> dict[str, dict[str, float]]:
    """Return what was measured before an interruption."""
    if not path.is_file():
        return {}
    try:
        found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} must be JSON ({error}): delete its folder to run again"
        ) from error
    return found
