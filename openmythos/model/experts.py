"""Mixture of experts: a router, routed experts behind one sort, and shared experts.

Fine-grained and shared experts after DeepSeekMoE (arXiv 2401.06066); balanced without an
auxiliary loss by a bias on the choice alone, as in DeepSeek-V3 (arXiv 2412.19437).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from openmythos.config import MythosConfig
from openmythos.model.adapters import loop_linear
from openmythos.model.feed_forward import FEED_FORWARD, FeedForward
from openmythos.model.grouped import grouped_linear
from openmythos.model.remade import remade, transformed
from openmythos.model.wide import autocast_dtype

# Up to so many (token, expert) pairs, multiplying by views of the chosen experts' matrices is
# quicker than the grouped product: 105 against 340 us for 4 pairs of 32 experts of 256 x 96, but
# 885 against 520 for 32 pairs.
FEW_PAIRS = 8


class Router(nn.Module):
    """Sigmoid affinities; the top experts by affinity + bias, weighted by affinity alone.

    The bias is `balance * balance_rate` with `balance` a count of moves: an integer buffer, so
    that casting the model to bf16 cannot round it.
    """

    balance: Tensor

    def __init__(self, config: MythosConfig) -> None:
        super().__init__()
        own = (config.router_loops,) if config.router_loops > 1 else ()
        self.weight = nn.Parameter(torch.empty(*own, config.experts, config.hidden_size))
        self.register_buffer("balance", torch.zeros(config.experts, dtype=torch.int32))
        self.chosen, self.rate = config.experts_per_token, config.balance_rate

    def forward(
        self,
        x: Float[Tensor, "*rows hidden"],
        loop: Int[Tensor, "*leading"],
        given: Int[Tensor, "*rows chosen"] | None = None,
    ) -> tuple[Int[Tensor, "*rows chosen"], Float[Tensor, "*rows chosen"]]:
        """Return the chosen experts and their weights (fp32 or wider, summing to 1).

        `given` replaces the choice for experiments; weights still come from the affinities. The
        leading axes of `x` start with those of `loop` (none: one loop for all).
        """
        scores = self._scores(x, loop)
        if given is None:
            affinity = scores.detach().sigmoid()
            given = (affinity + self.balance * self.rate).topk(self.chosen, -1).indices
        # The chosen affinities over their sum, in logarithms: all of them may round to 0.
        return given, F.logsigmoid(scores.gather(-1, given)).softmax(-1)

    def _scores(self, x: Tensor, loop: Tensor) -> Tensor:
        """Affinities before the sigmoid, in fp32 or wider."""
        if autocast_dtype(x.device) is not None:
            with torch.autocast(x.device.type, enabled=False):
                return self._scores(x, loop)
        wide = x.float() if x.itemsize < 4 else x
        weight = self.weight.to(wide.dtype)
        return F.linear(wide, weight) if weight.ndim == 2 else loop_linear(wide, weight, loop)

    @torch.no_grad()
    def rebalance(self, counts: Int[Tensor, " experts"]) -> None:
        """Move each bias one step up where `counts` (of one optimizer step) is below the mean.

        Equation 16 of DeepSeek-V3's report: called once after an optimizer step, with counts
        summed over the global batch and all loops.
        """
        mean = counts.sum() / counts.numel()
        self.balance += torch.sign(mean - counts).to(torch.int32)

    def flops(self) -> int:
        """Floating-point operations per token, forward."""
        return 2 * self.weight.shape[-2] * self.weight.shape[-1]


class Experts(nn.Module):
    """Routed experts plus shared ones, in place of a dense feed-forward."""

    def __init__(self, config: MythosConfig) -> None:
        super().__init__()
        self.activation, parts = FEED_FORWARD[config.feed_forward]
        count, hidden, size = config.experts, config.hidden_size, config.expert_size
        self.router = Router(config)
        self.w_in = nn.Parameter(torch.empty(count, hidden, parts * size))
        self.w_out = nn.Parameter(torch.empty(count, size, hidden))
        self.parts, self.scale = parts, config.routed_scale
        self.shared = (
            FeedForward(
                config.feed_forward,
                hidden,
                config.shared_experts * size,
                config.lora_rank,
                config.lora_loops or 1,
            )
            if config.shared_experts
            else None
        )

    def forward(
        self,
        x: Float[Tensor, "*rows hidden"],
        loop: Int[Tensor, "*leading"],
        given: Int[Tensor, "*rows chosen"] | None = None,
        alone: int | None = None,
    ) -> tuple[Float[Tensor, "*rows hidden"], Int[Tensor, "*rows chosen"]]:
        """Return the output and the chosen experts of each token.

        With `alone`, the first so many rows are multiplied one by one, so that their bits do not
        depend on who chose the same expert; the rest is padding and gets zeros.
        """
        flat = x.flatten(0, -2)
        chosen, weights = (part.flatten(0, -2) for part in self.router(x, loop, given))
        # Neither a compiler nor a derivative follows numbers into Python.
        few = chosen.numel() <= FEW_PAIRS and not (torch.compiler.is_compiling() or transformed())
        if alone is not None:
            y = torch.zeros_like(flat)
            rows = [flat[row : row + 1].clone() for row in range(alone)]  # aligned alike
            y[:alone] = self._one_by_one(rows, chosen[:alone], weights[:alone])
        elif few and flat.device.type == "cpu" and not torch.is_grad_enabled():
            y = self._one_by_one(flat.split(1), chosen, weights)
        else:
            y = self._sorted(flat, chosen, weights)
        y = y.view_as(x)
        if self.shared is not None:
            y = y + self.shared(x, loop)
        return y, chosen.unflatten(0, x.shape[:-1])

    def _sorted(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sort the (token, expert) pairs by expert and multiply group by group."""
        ids = torch.arange(len(self.w_in), device=x.device)
        expert, pairs = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(expert, ids, right=True, out_int32=True)
        token = pairs // chosen.shape[1]  # whose pair it is
        wide = grouped_linear(x, self.w_in, ends, token)
        inner = self.activation(wide)
        # Weighed before the second product, so that its wide output need not be kept.
        scale = weights.flatten().index_select(0, pairs).unsqueeze(-1) * self.scale
        with remade(inner, lambda: self.activation(wide)) as again:
            weighed = (inner * scale).to(inner.dtype)
        with remade(weighed, lambda: (again() * scale).to(wide.dtype)):
            y = grouped_linear(weighed, self.w_out, ends)
        y = y.index_select(0, pairs.argsort())
        y = y.unflatten(0, chosen.shape)  # (tokens, chosen, hidden)
        return y.sum(1, dtype=weights.dtype).to(x.dtype)

    def _one_by_one(self, x: Sequence[Tensor], chosen: Tensor, weights: Tensor) -> Tensor:
        """Multiply by views of the chosen matrices: no other expert's weights are touched."""
        sums = []
        for row, experts, scales in zip(x, chosen.tolist(), weights.tolist(), strict=True):
            inner = torch.cat([torch.mm(row, self.w_in[expert]) for expert in experts])
            total = torch.zeros_like(row)
            parts = zip(self.activation(inner).split(1), experts, scales, strict=True)
            for part, expert, scale in parts:
                total = torch.addmm(total, part, self.w_out[expert], alpha=scale * self.scale)
            sums.append(total)
        return torch.cat(sums)

    def fused_splits(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Parameters that hold several matrices: the axis and the pieces' sizes."""
        size = self.w_out.shape[1]
        return {"w_in": (2, (size,) * self.parts)} if self.parts > 1 else {}

    def flops(self) -> int:
        """Floating-point operations per token, forward: the chosen experts only."""
        one = self.w_in[0].numel() + self.w_out[0].numel()
        shared = 0 if self.shared is None else self.shared.flops()
        return self.router.flops() + 2 * self.router.chosen * one + shared
