"""What a `Trainer` of transformers does for a model with experts."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from openmythos.huggingface.model import OpenMythosForCausalLM


class BalanceRouters(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Balances experts after each optimizer step, as `openmythos train` does.

    Without it the routers' biases stay as they are (DeepSeek-V3, arXiv 2412.19437).
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Move them by the step's loads."""
        del args, state, control
        model: nn.Module = given["model"]
        for part in model.modules():
            if isinstance(part, OpenMythosForCausalLM):
                part.rebalance()
