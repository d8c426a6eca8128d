"""Where a command's model runs, and what its weights are there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openmythos.config import WeightsChoice

if TYPE_CHECKING:
    from openmythos.inference.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Flags of the commands that write with a model."""

    device: str | None = None
    """Where the model runs, as torch names it: cpu, cuda, cuda:1, mps. Default: the CPU."""

    weights: WeightsChoice = "file"
    """What the weights are in memory. `file` is int8 where the file has it and native code
    multiplies it, else fp32; `auto` is bf16 where the model is quicker so here, else fp32."""

    def load(self, model: str | Path) -> LanguageModel:
        """Load a folder's model, or the package's of this name; raises as `openmythos.load`."""
        from openmythos.inference.language_model import load

        return load(model, self.weights, self.device)
