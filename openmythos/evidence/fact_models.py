"""Variations on the model that a claim about facts needs, and the product does not.

All take `loops` and give states as a looped model does, so that training, measuring and reading
the states are the same for all.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from openmythos.config import MythosConfig
from openmythos.model.transformer import MythosOutput, OpenMythos

HandsOn = Literal["state", "answer", "both"]
"""What a loop hands on to the next: its state, the expected embedding of its answer, that is the
mean of the embeddings of all tokens by the chances it gives them, or the sum of the two."""


class StepByStep(OpenMythos):
    """A model that is run one loop at a time, or of which every loop is one layer of its own.

    With `untied` it is a plain transformer that may be read after any layer: `loops` says how many
    run. What is handed on may be the answer alone: it is then in the form in which a token enters,
    as in reasoning by soft tokens (Zhang et al. 2025, arXiv 2505.15778), at each place and loop.
    """

    def __init__(
        self, config: MythosConfig, *, seed: int = 0, untied: bool, hands_on: HandsOn
    ) -> None:
        super().__init__(config, seed=seed)
        self.untied, self.hands_on = untied, hands_on

    def forward(  # type: ignore[override]
        self,
        token_ids: Int[Tensor, "batch sequence"],
        loops: int,
        *,
        backprop_loops: int | None = None,
        return_states: bool = False,
    ) -> MythosOutput:
        """Compute logits after `loops` loops; the state after each, where asked for."""
        h, states, layers = None, [], self.core.layers
        try:
            for loop in range(loops):
                if self.untied:
                    self.core.layers = nn.ModuleList([layers[loop]])
                out = super().forward(token_ids, 1, h0=h, return_states=True)
                assert out.states is not None
                states.append(out.states[0])
                h = states[-1]
                if self.hands_on != "state":
                    h = self._expected(out.logits) + (h if self.hands_on == "both" else 0)
        finally:
            self.core.layers = layers
        out.states = torch.stack(states) if return_states else None
        return out

    def _expected(self, logits: Tensor) -> Tensor:
        """Return the embedding that an answer has on average, scaled as a token's that enters."""
        expected = logits.float().softmax(dim=-1) @ self.embed.weight
        return expected * float(self.config.embedding_scale or 1.0)
