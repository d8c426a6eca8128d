"""Two variations on the model that a claim about facts needs, and the product does not.

Both take `loops` and give states as a looped model does, so that training, measuring and reading
the states are the same for all.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor, nn

from openmythos.model.transformer import MythosOutput, OpenMythos


class Untied(OpenMythos):
    """A plain transformer that may be read after any layer: `loops` says how many layers run."""

    def forward(  # type: ignore[override]
        self,
        token_ids: Int[Tensor, "batch sequence"],
        loops: int,
        *,
        backprop_loops: int | None = None,
        return_states: bool = False,
    ) -> MythosOutput:
        """Compute logits from the first `loops` layers; the state after each, where asked for."""
        layers, states = self.core.layers, []
        try:
            for count in range(1 if return_states else loops, loops + 1):
                self.core.layers = nn.ModuleList(list(layers)[:count])
                out = super().forward(token_ids, 1, return_states=return_states)
                if out.states is not None:
                    states.append(out.states[0])
        finally:
            self.core.layers = layers
        out.states = torch.stack(states) if states else None
        return out


class FedBack(OpenMythos):
    """A looped model that also reads its own answer: the expected embedding is added at each loop.

    What a place holds for an answer is then, in part, just what a token of that entity would hold.
    """

    def forward(  # type: ignore[override]
        self,
        token_ids: Int[Tensor, "batch sequence"],
        loops: int,
        *,
        backprop_loops: int | None = None,
        return_states: bool = False,
    ) -> MythosOutput:
        """Compute logits after `loops` loops; the state after each, where asked for."""
        h, states = None, []
        for _ in range(loops):
            out = super().forward(token_ids, 1, h0=h, return_states=True)
            assert out.states is not None
            states.append(out.states[0])
            expected = out.logits.float().softmax(dim=-1) @ self.embed.weight
            h = states[-1] + expected * float(self.config.embedding_scale or 1.0)
        out.states = torch.stack(states) if return_states else None
        return out
