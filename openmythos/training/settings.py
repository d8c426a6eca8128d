"""What a training run lets its user choose: frozen, validated, and free of torch.

The command line builds its flags and its help from these dataclasses, and must answer before
torch could be imported.
"""

from dataclasses import dataclass
from typing import Literal

from openmythos.errors import ConfigError

DepthLaw = Literal["fixed", "uniform", "poisson", "lognormal_poisson"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Muon for the matrices, AdamW for the rest, and one schedule for both."""

    muon_lr: float = 0.02
    """Learning rate of attention, feed-forward and expert matrices (Muon)."""

    adam_lr: float = 4e-3
    """Learning rate of everything else: embedding, head, router, LoRA, injection, norms (AdamW)."""

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


def schedule(step: int, steps: int, config: OptimizerConfig) -> float:
    """Returns what the learning rates are multiplied by at `step` (0-based) of `steps`: 0 to 1.

    A line up over `warmup_steps`, a constant 1, a line down over the last `decay_share` of the
    steps, which would reach 0 one step after the last. Where the two lines overlap the lower
    one counts. From `steps` on it is 0.
    """
    rising = (step + 1) / (config.warmup_steps + 1)
    decay_steps = config.decay_share * steps
    left = max(0, steps - step)
    falling = left / decay_steps if decay_steps else float(left > 0)
    return min(1.0, rising, falling)
