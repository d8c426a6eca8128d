"""What a pass of the core leaves behind, and what it is asked to write down loop by loop."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class CoreOutput:
    """What the loop leaves behind."""

    h: Float[Tensor, "batch sequence hidden"]
    loops: Int[Tensor, "batch sequence"]
    """Loops each token took."""
    notes: Notes | None = None
    """Experts chosen, to be counted when somebody asks."""
    routing: Int[Tensor, "loops layers batch sequence chosen"] | None = None
    """Experts chosen; -1 where a token had left the core."""
    states: Float[Tensor, "loops batch sequence hidden"] | None = None
    """The state after every loop; a token that has left keeps its last."""
    ponder: Float[Tensor, "batch sequence"] | None = None
    """Graves' ponder cost, of the rule `act`."""


@dataclass
class Notes:
    """What a call was asked to write down, loop by loop."""

    experts: int
    layers: int
    tokens: tuple[int, int]
    want_states: bool | Set[int] = False
    """After every loop, or after so many loops each."""
    want_routing: bool = False
    given: Int[Tensor, "loops layers batch sequence chosen"] | None = None
    chosen: list[tuple[list[Tensor], Tensor, Tensor | None]] = field(default_factory=list)
    routing: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    latest: Tensor | None = None

    def choices(self, loop: int, numbers: Tensor | None) -> list[Tensor | None]:
        """The given experts of the rows in the core at `loop`, layer by layer."""
        if self.given is None:
            return [None] * self.layers
        given = self.given[min(loop, len(self.given) - 1)]
        if numbers is None:
            return list(given)
        return [layer.flatten(0, 1).index_select(0, numbers) for layer in given]

    @property
    def by_token(self) -> bool:
        """Whether states or choices of each loop are wanted, for which loops must run in step."""
        return bool(self.want_states) or self.want_routing

    def keep_state(self, loops: int, h: Tensor) -> None:
        """Write down the state after so many loops, where it is wanted."""
        if self.want_states:
            self.latest = h
        if self.want_states is True or (self.want_states and loops in self.want_states):
            self.states.append(h)

    def count(self, chosen: list[Tensor], loop: Tensor, real: Tensor | None = None) -> None:
        """Note the experts chosen at `loop`, one for all or one for each sequence."""
        if chosen:
            self.chosen.append((chosen, loop, real))

    def loads(self) -> Tensor | None:
        """Return the tokens each expert got, `(loops, layers, experts)`, counted all at once."""
        if not self.chosen:
            return None
        cells = torch.cat([cell for noted in self.chosen for cell in self._cells(*noted)])
        one_loop = self.layers * self.experts
        loops = int(cells.max()) // one_loop + 1
        counts = cells.new_zeros(loops * one_loop)
        counts.scatter_add_(0, cells, torch.ones_like(cells))  # whole numbers: any order is exact
        return counts.view(loops, self.layers, self.experts)

    def _cells(self, chosen: list[Tensor], loop: Tensor, real: Tensor | None) -> Iterator[Tensor]:
        """One number for each choice, which stands for its loop, layer and expert together."""
        for number, choice in enumerate(chosen):
            row = loop if loop.ndim == 0 else loop.view(-1, *[1] * (choice.ndim - 1))
            cell = torch.add(choice, row, alpha=self.layers * self.experts)
            cell = cell if real is None else cell[real]
            yield (cell + number * self.experts).flatten()

    def route(self, chosen: list[Tensor], numbers: Tensor | None) -> None:
        """Write down the experts chosen by the rows in the core."""
        if not (self.want_routing and chosen):
            return
        batch, sequence = self.tokens
        table = chosen[0].new_full((self.layers, batch * sequence, chosen[0].shape[-1]), -1)
        for number, choice in enumerate(chosen):
            flat = choice.flatten(0, -2)
            if numbers is None:
                table[number] = flat
            else:
                table[number].index_copy_(0, numbers, flat)
        self.routing.append(table.unflatten(1, (batch, sequence)))

    def finish(self, output: CoreOutput) -> CoreOutput:
        """Put the notes into the output."""
        if isinstance(self.want_states, Set) and self.latest is not None:
            # Nothing changes after the last loop: a token that has left keeps its state.
            self.states += [self.latest] * (len(self.want_states) - len(self.states))
        finished = replace(
            output,
            notes=self,
            routing=torch.stack(self.routing) if self.routing else None,
            states=torch.stack(self.states) if self.states else None,
        )
        self.routing, self.states = [], []  # held by the output now
        self.given = self.latest = None
        return finished
