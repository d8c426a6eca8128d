"""Hyper-connections at the loop's boundary: a state of several lanes, as a variant to be measured.

A loop of a plain core has one state, which its layers read and write. Here it has several (Zhu et
al. 2024, arXiv 2409.19606; at the loop's boundary alone: arXiv 2604.21106 and 2604.21254). With
lanes i, each with a diagonal A_i of its own:

    u_i = A_i h_i + B e,    u = sum_i a_i u_i,    h_i' = sum_j M_ij u_j + b_i F(u)

where F is what the layers add to u, and what leaves the core is sum_i c_i h_i. The rows of M are
positive and sum to 1, so the linear part's radius stays below 1. At the start only the first lane
is read, and M gives it 0.98 of its own state: nearly the model without lanes.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from openmythos.config import MythosConfig
from openmythos.model.cache import Cache
from openmythos.model.core import Core, Rows
from openmythos.model.injection import Decay
from openmythos.model.notes import CoreOutput, Notes
from openmythos.model.rope import Rope
from openmythos.model.span import Place, Span
from openmythos.model.transformer import OpenMythos

WHOLE = "lanes are there for whole texts and one number of loops, without a cache or exits"
LONGEST = 0.9
"""A of the last lane at the start; between it and the first, lanes are spaced evenly."""
OWN = 4.0
"""At the start M gives a lane e^4 times as much of its own state as of another's."""


class LanedCore(Core):
    """A core whose state has several lanes; reads whole texts only, without a cache or exits."""

    def __init__(self, config: MythosConfig, lanes: int) -> None:
        super().__init__(config)
        self.lanes = lanes
        self.decays = nn.ModuleList(Decay(config.hidden_size) for _ in range(lanes - 1))
        first = torch.zeros(lanes)
        first[0] = 1
        self.read_scale = nn.Parameter(first.clone())
        self.write_scale = nn.Parameter(torch.ones(lanes))
        self.out_scale = nn.Parameter(first.clone())
        self.mix_scale = nn.Parameter((OWN * torch.eye(lanes)).flatten())  # a vector never decays

    def forward(
        self, e: Tensor, rope: Rope, span: Span, loops: int | Tensor, **how: Any
    ) -> CoreOutput:
        """Run the loop, as `Core` does."""
        if not isinstance(loops, int) or how.get("rule") is not None:
            raise NotImplementedError(WHOLE)
        return super().forward(e, rope, span, loops, **how)

    def start(self) -> None:
        """Set the further lanes' diagonals, slower ones for later lanes."""
        first = float(self.injection.A.detach().mean())
        for number, decay in enumerate(self.decays, start=1):
            decay.reset_parameters(first + (LONGEST - first) * number / len(self.decays))  # type: ignore[operator]

    def mixing(self) -> Float[Tensor, "lanes lanes"]:
        """M: rows are positive and sum to 1."""
        return self.mix_scale.view(self.lanes, self.lanes).softmax(-1)

    def carries(self, first: Tensor) -> list[Tensor]:
        """The diagonals of all lanes."""
        return [first, *(decay.A for decay in self.decays)]  # type: ignore[list-item]

    def _together(
        self,
        h: Tensor,
        rows: Rows,
        loops: int,
        window: int,
        cache: Cache | None,
        notes: Notes,
    ) -> CoreOutput:
        if cache is not None:
            raise NotImplementedError(WHOLE)
        numbers, learns = torch.arange(loops, device=h.device), torch.is_grad_enabled()
        state, carries, mixing = (
            torch.stack([h] * self.lanes),
            self.carries(rows.carry),
            self.mixing(),
        )
        for loop in range(loops):
            with torch.set_grad_enabled(learns and loop >= loops - window):
                lanes = zip(state, carries, strict=True)
                carried = torch.stack([self.injection(x, rows.drive, a) for x, a in lanes])
                u = weighted(self.read_scale, carried)
                y, place = u, Place(rows.span, None, 0)
                for layer in self.layers:
                    y, _ = layer(y, rows.rope, numbers[loop], place, None)
                mixed = torch.einsum("ij,j...->i...", mixing, carried)
                state = mixed + torch.einsum("i,...->i...", self.write_scale, y - u)
                if notes.want_states:
                    notes.keep_state(loop + 1, weighted(self.out_scale, state))
        taken = torch.full(h.shape[:2], loops, device=h.device)
        return CoreOutput(weighted(self.out_scale, state), taken)


def weighted(scales: Float[Tensor, " lanes"], lanes: Float[Tensor, "lanes ..."]) -> Tensor:
    """The sum of the lanes, each by its scale."""
    return torch.einsum("i,i...->...", scales, lanes)


class Laned(OpenMythos):
    """A dense model whose core has lanes."""

    def __init__(self, config: MythosConfig, lanes: int, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        plain = self.core
        self.core = LanedCore(config, lanes)
        if not any(parameter.is_meta for parameter in plain.parameters()):
            self.core.load_state_dict(plain.state_dict(), strict=False)
            self.core.start()


def further_parameters(config: MythosConfig, lanes: int) -> int:
    """Return how many parameters lanes add."""
    return (lanes - 1) * 2 * config.hidden_size + 3 * lanes + lanes**2 if lanes > 1 else 0
