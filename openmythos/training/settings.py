"""What a training run lets its user choose: frozen, validated, and free of torch.

The command line builds its flags and its help from these dataclasses, and must answer before
torch could be imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from openmythos.config import check_types
from openmythos.errors import ConfigError

CorpusName = Literal["embedded", "sotu"]
DepthLaw = Literal["fixed", "near", "uniform", "poisson", "lognormal_poisson"]
MatrixOptimizer = Literal["muon", "adamw"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a training's text comes from: a corpus that has a name, or text of one's own."""

    corpus: CorpusName | None = None
    """Its split is its own."""
    text: Path | None = None
    """A .txt, .jsonl or .parquet file, or a folder of them."""
    field: str = "text"
    """Name of the text's field in JSONL and Parquet."""
    held_out: float = 0.05
    """Share of the documents of `text` that is held out."""

    def __post_init__(self) -> None:
        if (self.corpus is None) == (self.text is None):
            raise ConfigError("one of corpus and text must be given, and not both")
        for name in ("field", "held_out"):
            value = getattr(self, name)
            if self.text is None and value != type(self).__dataclass_fields__[name].default:
                raise ConfigError(
                    f"{name}={value!r} must go with text: a corpus with a name is split already"
                )

    def as_json(self) -> dict[str, Any]:
        """Return what a run's settings keep of it."""
        if self.text is None:
            return {"corpus": self.corpus}
        return {"text": str(self.text), "field": self.field, "held_out": self.held_out}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Source:
        """Return what `as_json` was made of; ValueError where it is not whole."""
        if "corpus" in kept:
            return cls(corpus=kept["corpus"])
        if not {"text", "field", "held_out"} <= set(kept):
            raise ValueError("source must name a corpus or a text")
        return cls(text=Path(kept["text"]), field=kept["field"], held_out=kept["held_out"])


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Muon for the matrices, AdamW for the rest, and one schedule for both."""

    matrices: MatrixOptimizer = "muon"
    """What updates attention, feed-forward and expert matrices; the rest is AdamW's always."""

    muon_lr: float = 0.02
    """Learning rate of Muon."""

    adam_lr: float = 4e-3
    """Learning rate of AdamW: embedding, head, router, LoRA, injection, norms."""

    momentum: float = 0.95
    """Momentum of Muon, from 0 to below 1."""

    adam_beta1: float = 0.9
    """AdamW's decay of the mean gradient, from 0 to below 1."""

    adam_beta2: float = 0.95
    """AdamW's decay of the mean squared gradient, from 0 to below 1."""

    weight_decay: float = 0.1
    """Share of a matrix lost per step, times its learning rate; not of embedding and injection."""

    clip: float = 1.0
    """Largest global norm of the gradient; longer ones are scaled down to it. 0 never clips."""

    warmup_steps: int = 20
    """Steps over which the learning rates rise from near 0."""

    decay_share: float = 0.5
    """Share of all steps, at the end, over which the learning rates fall in a line to 0."""

    def __post_init__(self) -> None:
        check_types(self)
        kinds = get_args(MatrixOptimizer)
        self._require("matrices", f"be one of {', '.join(kinds)}", self.matrices in kinds)
        for name in ("muon_lr", "adam_lr"):
            self._require(name, "be above 0", getattr(self, name) > 0)
        for name in ("momentum", "adam_beta1", "adam_beta2"):
            self._require(name, "be at least 0 and below 1", 0 <= getattr(self, name) < 1)
        for name in ("weight_decay", "clip", "warmup_steps"):
            self._require(name, "be 0 or more", getattr(self, name) >= 0)
        self._require("decay_share", "lie between 0 and 1", 0 <= self.decay_share <= 1)

    def _require(self, name: str, rule: str, holds: bool) -> None:
        if not holds:
            default = type(self).__dataclass_fields__[name].default
            value = getattr(self, name)
            raise ConfigError(f"{name}={value} must {rule}: the default is {default}")


Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "always", "never"]
TrainedPart = Literal["all", "adapters"]
Log = Literal["none", "tensorboard"]
Finish = Literal["last", "best"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, apart from its text and the model's shape."""

    steps: int = 1000
    """Optimizer steps."""

    batch_size: int = 16
    """Sequences in one optimizer step."""

    length: int = 256
    """Tokens predicted in each sequence."""

    accumulation: int = 1
    """Parts into which a batch is cut, so that a part fits in memory. Changes no result but
    rounding."""

    depth: DepthLaw = "poisson"
    """Law of the loops of each sequence; its mean is the model's mean_loops."""

    backprop_loops: int | None = None
    """Last loops that carry gradient. Default: all up to a mean of 8, else half of the mean."""

    train: TrainedPart = "all"
    """What learns: everything, or the depth-wise LoRA alone."""

    ponder_cost: float = 0.01
    """Weight of Graves' ponder cost, for a model with learned_act."""

    gate_steps: int = 100
    """Steps that train the halting gate on the finished model; 0 leaves it untrained."""

    seed: int = 0
    """Seed of weights, order of text, loops and noise."""

    precision: Precision = "auto"
    """fp32, bf16 autocast, or whichever is measured to be faster here."""

    threads: int | None = None
    """CPU threads. Default: as many as torch takes."""

    compile: Compile = "auto"
    """Compile the layers with torch.compile, which takes one or two minutes at the start: `auto`
    does on the CPU where the run is long enough and there is a C++ compiler."""

    checkpoint_activations: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""

    save_every: int = 100
    """Steps between checkpoints."""

    keep: int = 2
    """Checkpoints that are kept, apart from the best."""

    finish: Finish = "last"
    """Whose weights the finished model has: those of the last step, or those that measured best on
    held-out text, for a text read so often that the model learns it by heart."""

    evaluate_every: int = 100
    """Steps between measurements on held-out text."""

    evaluate_tokens: int = 16_384
    """Tokens in such a measurement, from the start of the held-out text; the last measurement takes
    all of it."""

    log: Log = "none"
    """Where metrics go beside metrics.jsonl."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Learning rates and their schedule."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "batch_size", "length", "accumulation", "save_every", "keep"):
            self._require(name, 1)
        for name in ("evaluate_every", "evaluate_tokens"):
            self._require(name, 1)
        for name in ("seed", "gate_steps", "ponder_cost"):
            self._require(name, 0)
        for name in ("backprop_loops", "threads"):
            if getattr(self, name) is not None:
                self._require(name, 1)
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"accumulation={self.accumulation} must divide batch_size={self.batch_size}: "
                "parts are of one size"
            )
        kinds = {
            "depth": DepthLaw,
            "precision": Precision,
            "compile": Compile,
            "train": TrainedPart,
            "finish": Finish,
            "log": Log,
        }
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                names = ", ".join(get_args(kind))
                raise ConfigError(f"{name}={getattr(self, name)!r} must be one of {names}")

    def _require(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ConfigError(f"{name}={getattr(self, name)} must be {least} or more")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step predicts."""
        return self.batch_size * self.length


def same_until(step: int, one: TrainConfig, other: TrainConfig) -> bool:
    """Whether two trainings that may differ in `steps` take the same first `step` steps.

    The schedule is constant until it decays, so a run can be lengthened or shortened before.
    """
    if dataclasses.replace(one, steps=other.steps) != other:
        return False
    return one.steps == other.steps or step <= min(decay_begins(one), decay_begins(other))


def decay_begins(config: TrainConfig) -> float:
    """The step at which the learning rates begin to fall."""
    return config.steps - config.optimizer.decay_share * config.steps


def schedule(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return what the learning rates are multiplied by at `step` (0-based) of `steps`: 0 to 1.

    A line up over `warmup_steps`, a constant 1, a line down over the last `decay_share` of the
    steps, which would reach 0 one step after the last. Where the two lines overlap the lower
    one counts. From `steps` on it is 0.
    """
    rising = (step + 1) / (config.warmup_steps + 1)
    decay_steps = config.decay_share * steps
    left = max(0, steps - step)
    falling = left / decay_steps if decay_steps else float(left > 0)
    return min(1.0, rising, falling)
