"""Forward and backward passes recorded once as CUDA graphs, then replayed at every step.

A small model's step on a GPU is thousands of kernels of a few microseconds each, and starting
them from Python takes far longer than running them. A graph starts them all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from openmythos.model.call import check_token_ids
from openmythos.model.transformer import OpenMythos

MOST = 16
"""Graphs that are kept: one for each number of loops and size of batch."""

WARM = 3
"""Passes before one is recorded, in which libraries choose their kernels and get their memory."""

PassLoss = Callable[[Tensor, Tensor, int], Float[Tensor, ""]]
"""A batch's loss in nats, of token ids, targets and a number of loops."""


class Graph(NamedTuple):
    """One recorded pass, and the places that it reads from and writes to."""

    graph: torch.cuda.CUDAGraph
    token_ids: Tensor
    targets: Tensor
    loss: Tensor


class RecordedPasses:
    """Computes a dense model's losses and gradients as `loss(...).backward()` does."""

    def __init__(self, model: OpenMythos, loss: PassLoss) -> None:
        self.model, self.loss = model, loss
        self.graphs: dict[tuple[tuple[int, ...], int], Graph] = {}
        self.gradients: dict[nn.Parameter, Tensor] = {}
        """What all graphs add to; it lies outside of their own memory."""
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, token_ids: Tensor, targets: Tensor, loops: int) -> Tensor:
        """Put the gradients into the parameters' `grad`; return the loss.

        Args:
            token_ids: int64, `(batch, sequence)`, on the CPU.
            targets: as `token_ids`.
            loops: of every token.

        Returns:
            The loss, a scalar that the next call overwrites.
        """
        check_token_ids(token_ids, self.model.config)
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        key = (tuple(token_ids.shape), loops)
        if key not in self.graphs and len(self.graphs) < MOST:
            self.graphs[key] = self._record(token_ids, targets, loops)
        if key not in self.graphs:
            device = self.model.embed.weight.device
            return self._run(token_ids.to(device), targets.to(device), loops)
        recorded = self.graphs[key]
        recorded.token_ids.copy_(token_ids)
        recorded.targets.copy_(targets)
        recorded.graph.replay()
        return recorded.loss

    def _record(self, token_ids: Tensor, targets: Tensor, loops: int) -> Graph:
        device = self.model.embed.weight.device
        token_ids, targets = token_ids.to(device, copy=True), targets.to(device, copy=True)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM):
                self.loss(token_ids, targets, loops).backward()
        torch.cuda.current_stream().wait_stream(beside)
        found = ((p, p.grad) for p in self.model.parameters())
        self.gradients = {p: gradient for p, gradient in found if gradient is not None}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = self._run(token_ids, targets, loops)
        return Graph(graph, token_ids, targets, loss)

    def _run(self, token_ids: Tensor, targets: Tensor, loops: int) -> Tensor:
        torch._foreach_zero_(list(self.gradients.values()))
        loss = self.loss(token_ids, targets, loops)
        loss.backward()
        return loss.detach()
