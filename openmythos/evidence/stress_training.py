"""Trainings at learning rates that may be too high, watched step by step, and what they leave.

Two recipes. `stress` takes away what usually keeps a training together: AdamW at one rate for
everything, no clipping of gradients, pre-norm layers without norms on queries and keys. `full` is
the package's own recipe, with both of its learning rates moved together.

A training ends where its loss or its gradient is no longer finite; that is a result, not an error.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from openmythos.config import InjectionKind
from openmythos.evidence.cells import Result, Say, as_json
from openmythos.evidence.fit import FitConfig, fit
from openmythos.evidence.plain import trained_parameters
from openmythos.evidence.text_training import Texts, TextTraining
from openmythos.model.core import Core
from openmythos.model.notes import CoreOutput
from openmythos.model.transformer import OpenMythos, cross_entropy
from openmythos.training.evaluate import Reading, evaluate
from openmythos.training.settings import CorpusName, OptimizerConfig
from openmythos.training.token_file import TokenFile

Recipe = Literal["stress", "full"]

STEPS_A_POINT = 10
"""Steps that one point of a kept course stands for."""

SEQUENCES, LENGTH = 8, 64
"""Text on which many loops are measured."""


@dataclass(frozen=True, kw_only=True)
class StressTraining:
    """One training of one injection at one learning rate."""

    injection: InjectionKind
    recipe: Recipe
    rate: float
    """AdamW's learning rate; under `full`, Muon's keeps its usual ratio to it."""
    seed: int = 0
    hidden_size: int = 64
    loops: int = 8
    steps: int = 400
    batch_size: int = 16
    length: int = 64
    corpus: CorpusName = "embedded"
    vocab_size: int = 1024
    measured_tokens: int = 8192
    """Held-out tokens for the loss at the end."""
    deepest: int = 1024
    """Most loops that the state and the loss are followed to."""

    @property
    def text(self) -> TextTraining:
        """The model's shape and its batches."""
        shape = {
            "hidden_size": self.hidden_size,
            "mean_loops": self.loops,
            "injection": self.injection,
            "qk_norm": self.recipe == "full",
        }
        return TextTraining(
            shape=shape,
            depth="fixed",
            steps=self.steps,
            batch_size=self.batch_size,
            length=self.length,
            corpus=self.corpus,
            vocab_size=self.vocab_size,
            seed=self.seed,
        )

    @property
    def optimizer(self) -> OptimizerConfig:
        """The recipe's optimizer at this rate."""
        if self.recipe == "stress":
            return OptimizerConfig(matrices="adamw", adam_lr=self.rate, clip=0.0)
        usual = OptimizerConfig()
        ratio = usual.muon_lr / usual.adam_lr
        return OptimizerConfig(adam_lr=self.rate, muon_lr=ratio * self.rate)

    def as_json(self) -> dict[str, Any]:
        """Return the settings as a cell keeps them."""
        fields = {**dataclasses.asdict(self), "optimizer": dataclasses.asdict(self.optimizer)}
        fields |= {"followed": (SEQUENCES, LENGTH), "steps_a_point": STEPS_A_POINT}
        return as_json(fields)

    def run(self, folder: Path, texts: Texts, say: Say) -> Result:
        """Train from the start, and measure.

        A training takes minutes and its course is kept in memory, so one that was interrupted
        begins again.
        """
        training = folder / "training"
        shutil.rmtree(training, ignore_errors=True)
        model = OpenMythos(self.text.config, seed=self.seed)
        config = FitConfig(
            steps=self.steps, seed=self.seed, optimizer=self.optimizer, save_every=self.steps
        )

        def report(step: int, loss: float) -> None:
            say(f"step {step} of {self.steps}, loss {loss:.3f}")

        with Course(model) as course:
            fit(
                model,
                lambda step: self.text.batch(step, texts.training),
                config,
                training,
                report=report,
                watch=course.note,
            )
        shutil.rmtree(training, ignore_errors=True)  # none where it diverged early
        if course.diverged_at is not None:
            say(f"not finite at step {course.diverged_at}")
        return self._measured(model.cpu(), course, texts)

    def _measured(self, model: OpenMythos, course: Course, texts: Texts) -> Result:
        """What is kept of a training; a loss only where it went to its end."""
        fields = {"injection": self.injection, "recipe": self.recipe, "rate": self.rate}
        result: Result = {
            **fields,
            "parameters": trained_parameters(model),
            "trained_loops": self.loops,
            "diverged_at": course.diverged_at,
            "frequencies": nats_by_frequency(texts.training, texts.test),
            "largest_radius": course.largest("radius"),
            "course": course.as_json(),
            "loss": None,
            "states": None,
            "losses": None,
        }
        if course.diverged_at is None:
            length = min(LENGTH, self.length)
            starts = texts.test.windows(length).starts[:SEQUENCES]
            token_ids = torch.from_numpy(texts.test.read(starts, length))
            deep = at_many_loops(model, token_ids, self.deepest)
            result["loss"] = self._loss(model, texts)
            result["states"], result["losses"] = deep.sizes, deep.losses
        return result

    def _loss(self, model: OpenMythos, texts: Texts) -> float | None:
        """Nats per held-out token at the trained depth."""
        found = evaluate(
            model,
            texts.test,
            texts.tokenizer.token_bytes,
            [self.loops],
            reading=Reading.of(self.length, self.measured_tokens),
        )
        return finite(found.bits_per_byte[0] * math.log(2) * found.bytes / found.tokens)


class Course:
    """Watches every step: loss, gradient's norm, spectral radius and size of the state."""

    def __init__(self, model: OpenMythos) -> None:
        self.model, self.size = model, 0.0
        self.diverged_at: int | None = None
        """The step, from 1, whose loss or gradient was not finite."""
        self.steps: dict[str, list[float]] = {
            "loss": [],
            "gradient": [],
            "radius": [],
            "state": [],
        }

    def __enter__(self) -> Course:
        def keep_size(_core: nn.Module, _inputs: tuple[Any, ...], output: CoreOutput) -> None:
            self.size = state_size(output.h)

        self.hook = self.model.core.register_forward_hook(keep_size)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.hook.remove()

    def note(self, step: int, loss: float, gradient: float) -> bool:
        """Take a step's figures; say whether the training can go on."""
        self.steps["loss"].append(loss)
        self.steps["gradient"].append(gradient)
        self.steps["radius"].append(spectral_radius(self.model.core))
        self.steps["state"].append(self.size)
        if not (math.isfinite(loss) and math.isfinite(gradient)):
            self.diverged_at = step
        return self.diverged_at is None

    def largest(self, what: str) -> float | None:
        """Return the largest value of a figure over all steps, None where one is not finite."""
        return finite(float(np.max(self.steps[what])))

    def as_json(self) -> dict[str, list[float | None]]:
        """Return a point for every `STEPS_A_POINT` steps: mean loss, largest of the others."""
        parts = {
            name: [values[at : at + STEPS_A_POINT] for at in range(0, len(values), STEPS_A_POINT)]
            for name, values in self.steps.items()
        }
        return {
            name: [
                finite(float(f"{np.mean(part) if name == 'loss' else np.max(part):.4g}"))
                for part in points
            ]
            for name, points in parts.items()
        }


def finite(value: float) -> float | None:
    """Return a number as JSON has it: None where it is not finite."""
    return value if math.isfinite(value) else None


def spectral_radius(core: Core) -> float:
    """Return the spectral radius of the injection's linear part, infinite where it has none."""
    if not all(bool(p.isfinite().all()) for p in core.injection.parameters()):
        return math.inf
    injection: Any = core.injection
    return float(injection.spectral_radius())


def state_size(h: Tensor) -> float:
    """Return the root of the mean square of a token's state, on average over tokens."""
    return float(h.detach().cpu().double().square().mean(-1).sqrt().mean())


class Deep(NamedTuple):
    """What a model does after 1, 2, 4, ... loops; None where it is not finite."""

    sizes: dict[int, float | None]
    """Of the state."""
    losses: dict[int, float | None]
    """Nats per token."""


@torch.no_grad()
def at_many_loops(model: OpenMythos, token_ids: Int[Tensor, "batch longer"], deepest: int) -> Deep:
    """Return the state's size and the loss on a text, by loops up to `deepest`."""
    depths = [2**n for n in range(deepest.bit_length()) if 2**n <= deepest]
    states = model(token_ids[:, :-1], depths[-1], return_states=True).states
    sizes, losses = {}, {}
    for depth in depths:
        h = states[depth - 1]
        sizes[depth] = finite(state_size(h))
        losses[depth] = finite(float(cross_entropy(model.decode(h), token_ids[:, 1:]).mean()))
    return Deep(sizes, losses)


def untrained_sizes(training: StressTraining) -> dict[int, float | None]:
    """Return the state's size by loops of a model as initialised, on random tokens."""
    model = OpenMythos(training.text.config, seed=training.seed).eval()
    generator = torch.Generator().manual_seed(training.seed)
    shape = (SEQUENCES, min(LENGTH, training.length) + 1)
    token_ids = torch.randint(training.vocab_size, shape, generator=generator)
    return at_many_loops(model, token_ids, training.deepest).sizes


def nats_by_frequency(training: TokenFile, test: TokenFile) -> float:
    """Return nats per token of a text by the frequencies of its tokens in another, plus one.

    What a model reaches that has learnt nothing but which tokens are common.
    """
    counts = np.bincount(_all_ids(training), minlength=training.vocab_size) + 1
    logarithms = np.log(counts / counts.sum())
    return float(-logarithms[_all_ids(test)].mean())


def _all_ids(file: TokenFile) -> Any:
    return file.read(np.array([0]), file.tokens - 1)[0]
