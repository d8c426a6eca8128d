"""The loop: h_{t+1} = u_t + F_t(u_t) with u_t = A h_t + B e, for as long as each token needs.

One class, called once per forward pass, because then the whole loop can be one sharded unit:
ranks with other depths run the same collectives. Four ways through it, chosen by what a call
asks for; each does the same arithmetic for a token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openmythos.config import MythosConfig
from openmythos.errors import InputError
from openmythos.model.cache import Cache, Frozen
from openmythos.model.experts import Experts
from openmythos.model.halting import LearnedExit, Memory, Rule, select
from openmythos.model.injection import INJECTION
from openmythos.model.layer import Layer
from openmythos.model.native.exits import Exits, decided_here
from openmythos.model.native.linear import takes
from openmythos.model.native.run import run_loops
from openmythos.model.norm import RMSNorm
from openmythos.model.notes import CoreOutput, Notes
from openmythos.model.rope import Rope
from openmythos.model.span import Keeper, Place, Span


@dataclass(frozen=True)
class Rows:
    """The tokens in the core and what stays the same for them over the loops."""

    span: Span
    rope: Rope
    drive: Float[Tensor, "*rows hidden"]
    carry: Tensor
    numbers: Int[Tensor, " rows"] | None = None
    """Their flat numbers in the batch; None: all."""
    own_carry: bool | None = None
    """Whether each row has a carry of its own, or all have one; None: as its shape says, which it
    does while there is an axis for the batch."""

    def __post_init__(self) -> None:
        """See whose the carry is, before rows are taken from it."""
        if self.own_carry is None:
            axes = self.drive.shape[:-1]
            own = len(axes) == 2 and getattr(self.carry, "shape", ())[:-1] == axes
            object.__setattr__(self, "own_carry", own)

    def keep(self, kept: Int[Tensor, " kept"], numbers: Int[Tensor, " rows"]) -> Rows:
        """Only the rows at places `kept` of a flat view, whose numbers are `numbers`."""
        remaining = numbers.index_select(0, kept)
        rope = self.rope if self.rope.cos.ndim == 3 else Rope(*(x.flatten(0, 1) for x in self.rope))
        flat = self.drive.ndim == 2
        every = self if flat else self.of_each(lambda part: part.flatten(0, 1))
        some = every.of_each(lambda part: part.index_select(0, kept))
        span = self.span.at_rows(remaining)
        return replace(some, span=span, rope=rope.select(kept), numbers=remaining)

    def of_each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """Change what each row has of the injection alike."""
        carry = change(self.carry) if self.own_carry else self.carry
        return replace(self, drive=change(self.drive), carry=carry)


class Inside(NamedTuple):
    """Rows that take their own numbers of loops, and what decides when they leave."""

    h: Float[Tensor, "*rows hidden"]
    rows: Rows
    budget: Int[Tensor, " rows"]
    rule: Rule | None
    memory: Memory
    fired: Bool[Tensor, " rows"]
    """Rows that run one loop more, because the rule has fired on them."""


class Core(nn.Module):
    """The layers that run many times, their injection and the learned exits."""

    def __init__(self, config: MythosConfig) -> None:
        super().__init__()
        self.config = config
        self.injection = INJECTION[config.injection](config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, in_core=True) for _ in range(config.core_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps) if config.loop_norm else None
        # Trained after the model: meanwhile no loss reaches it, which DDP takes for a mistake.
        self.gate = LearnedExit(config.hidden_size, config.gate_size).requires_grad_(False)
        self.act = LearnedExit(config.hidden_size) if config.learned_act else None
        self.checkpointing = False
        """Recompute each layer in the backward pass instead of keeping its activations."""

    def learned_exits(self) -> dict[str, LearnedExit]:
        """The exits that have weights, by the name of their rule."""
        return {"gate": self.gate} | ({} if self.act is None else {"act": self.act})

    def forward(
        self,
        e: Float[Tensor, "batch sequence hidden"],
        rope: Rope,
        span: Span,
        loops: int | Int[Tensor, " batch"] | Int[Tensor, "batch sequence"],
        *,
        rule: Rule | None = None,
        cache: Cache | None = None,
        new_cache: Callable[[], Cache] | None = None,
        h0: Float[Tensor, "batch sequence hidden"] | None = None,
        backprop_loops: int | None = None,
        routing: Int[Tensor, "loops layers batch sequence chosen"] | None = None,
        return_states: bool | Collection[int] = False,
        return_routing: bool = False,
    ) -> CoreOutput:
        """Run the loop.

        Args:
            e: the prelude's output.
            rope: angles of every token.
            span: where the tokens stand and what they see.
            loops: budget of every token, of each sequence or of each token.
            rule: halting rule; None runs every token to its budget.
            cache: kept keys and values of earlier calls.
            new_cache: makes a cache of one slot, for exits in a call that came without one.
            h0: first state; default by `config.h0` (zeros for noise, which the Trainer draws).
            backprop_loops: loops with gradient, the last ones; None: all.
            routing: experts to take instead of the router's choice.
            return_states: keep the state after every loop, or after so many loops each.
            return_routing: keep the experts chosen at every loop.
        """
        wide = e.float() if e.itemsize < 4 else e
        drive, carry = self.injection.prepare(e)
        rows = Rows(span, rope, drive.to(wide.dtype), carry)
        h = self.first_state(wide) if h0 is None else h0.to(wide.dtype)
        notes = Notes(
            experts=self.config.experts,
            layers=self.config.core_layers,
            tokens=(e.shape[0], e.shape[1]),
            want_states=return_states if isinstance(return_states, bool) else set(return_states),
            want_routing=return_routing,
            given=None if routing is None else _carried_on(routing),
        )
        if isinstance(loops, Tensor):
            budget = loops.long()
        else:  # filled where it lies: a copy from the host could not be recorded
            budget = torch.full((), loops, device=e.device)
        if rule is None and isinstance(loops, int):
            window = loops if backprop_loops is None else backprop_loops
            output = self._together(h, rows, loops, window, cache, notes)
        elif rule is None and budget.ndim == 1 and cache is None and not notes.by_token:
            window = int(budget.max()) if backprop_loops is None else backprop_loops
            output = self._by_sequence(h, rows, budget, window, notes)
        else:
            budget = budget.unsqueeze(1) if budget.ndim == 1 else budget
            budget = budget.expand(e.shape[:2])
            if torch.is_grad_enabled() and cache is None and self._learns(drive, h):
                output = self._by_token_with_gradient(h, rows, budget, rule, notes)
            else:
                if cache is None:
                    assert new_cache is not None
                    cache = new_cache()
                output = self._by_token(h, rows, budget, rule, cache, notes)
        return notes.finish(output)

    def _learns(self, *inputs: Tensor) -> bool:
        """Whether anything needs a gradient: the adapters may learn behind a frozen prelude."""
        return any(tensor.requires_grad for tensor in (*inputs, *self.parameters()))

    def first_state(self, e: Tensor) -> Tensor:
        """The state before the first loop where none is given; `e` is fp32 or wider."""
        return e if self.config.h0 == "e" else torch.zeros_like(e)

    def one_loop(
        self,
        h: Float[Tensor, "*rows hidden"],
        rows: Rows,
        loop: Int[Tensor, "*leading"],
        stores: Sequence[Keeper] | None = None,
        slot: int = 0,
        choices: list[Tensor | None] | None = None,
    ) -> tuple[Float[Tensor, "*rows hidden"], list[Tensor]]:
        """Apply the equation once; return the new state and each layer's chosen experts."""
        h, chosen = self.injection(h, rows.drive, rows.carry), []
        for number, layer in enumerate(self.layers):
            place = Place(rows.span, None if stores is None else stores[number], slot)
            given = None if choices is None else choices[number]
            if self.checkpointing and torch.is_grad_enabled():
                h, choice = checkpoint(layer, h, rows.rope, loop, place, given, use_reentrant=False)
            else:
                h, choice = layer(h, rows.rope, loop, place, given)
            if choice is not None:
                chosen.append(choice)
        return (h if self.norm is None else self.norm(h).to(h.dtype)), chosen

    def _together(
        self,
        h: Tensor,
        rows: Rows,
        loops: int,
        window: int,
        cache: Cache | None,
        notes: Notes,
    ) -> CoreOutput:
        """Every token takes the same number of loops, the last `window` with gradient."""
        done = None
        if cache is not None and not notes.by_token and notes.given is None:
            done = run_loops(self, h, rows, loops, cache)
        if done is not None:
            h, every = done
            loop_numbers = torch.arange(loops, device=h.device)
            for loop, chosen in enumerate(every):
                notes.count(chosen, loop_numbers[loop], rows.span.real)
        else:
            start = max(loops - window, 0)
            with torch.no_grad():
                h = self._in_step(h, rows, 0, start, cache, notes)
            h = self._in_step(h, rows, start, loops, cache, notes)
        if cache is not None and cache.slot_of(loops - 1) + 1 < cache.slots:
            cache.leave(rows.span, rows.span.all_rows(), loops - 1)
        taken = torch.full(h.shape[:2], loops, device=h.device)
        return CoreOutput(h, taken)

    def _in_step(
        self, h: Tensor, rows: Rows, first: int, end: int, cache: Cache | None, notes: Notes
    ) -> Tensor:
        """Run every token's loops `first` to `end`."""
        loop_numbers = torch.arange(end, device=h.device)
        for loop in range(first, end):
            slot = 0 if cache is None else cache.slot_of(loop)
            stores = None if cache is None else cache.core
            choices = notes.choices(loop, None)
            h, chosen = self.one_loop(h, rows, loop_numbers[loop], stores, slot, choices)
            notes.count(chosen, loop_numbers[loop], rows.span.real)
            notes.route(chosen, None)
            notes.keep_state(loop + 1, h)
        return h

    def _by_sequence(
        self, h: Tensor, rows: Rows, loops: Tensor, window: int, notes: Notes
    ) -> CoreOutput:
        """Every sequence takes its own number of loops, the last `window` with gradient.

        Sequences are sorted, deepest first, so that those still running are always a prefix:
        finished ones leave the batch instead of being masked. All are aligned at the start of
        the gradient window, each with its own loop number.
        """
        order = loops.argsort(descending=True, stable=True)
        depth = loops.index_select(0, order)
        h, rows = h.index_select(0, order), self._reorder(rows, order)
        if notes.given is not None:
            notes.given = notes.given.index_select(2, order)
        before = (depth - window).clamp(min=0)
        early = int((before > 0).sum())  # the others' first state may need a gradient
        if early:
            with torch.no_grad():
                start, end = torch.zeros_like(before[:early]), before[:early]
                ahead = self._shrinking(h[:early], self._cut(rows, early), start, end, notes)
            h = torch.cat([ahead, h[early:]])
        h = self._shrinking(h, rows, before, depth, notes)
        back = order.argsort()
        taken = loops.long().unsqueeze(1).expand(h.shape[:2])
        return CoreOutput(h.index_select(0, back), taken)

    def _shrinking(self, h: Tensor, rows: Rows, first: Tensor, end: Tensor, notes: Notes) -> Tensor:
        """Run each sequence's loops `first` to `end`; their counts must be sorted downwards."""
        todo = (end - first).tolist()
        finished: list[Tensor] = []
        for done in range(max(todo)):
            running = sum(count > done for count in todo)
            if running < len(h):
                finished.append(h[running:])
                h, rows = h[:running], self._cut(rows, running)
            loop = first[:running] + done
            choices = self._choices_by_sequence(notes, loop)
            h, chosen = self.one_loop(h, rows, loop, choices=choices)
            notes.count(chosen, loop, rows.span.real)
        return torch.cat([h, *reversed(finished)])

    @staticmethod
    def _choices_by_sequence(notes: Notes, loop: Tensor) -> list[Tensor | None] | None:
        if notes.given is None:
            return None
        at = loop.clamp(max=len(notes.given) - 1)
        picked = notes.given[at, :, torch.arange(len(loop), device=loop.device)]
        return list(picked.transpose(0, 1))  # layer by layer: (sequences, sequence, chosen)

    @staticmethod
    def _reorder(rows: Rows, order: Tensor) -> Rows:
        rope = rows.rope
        if rope.cos.shape[0] > 1:
            rope = rope.select(order)
        ordered = rows.of_each(lambda part: part.index_select(0, order))
        return replace(ordered, span=rows.span.reordered(order), rope=rope)

    @staticmethod
    def _cut(rows: Rows, count: int) -> Rows:
        rope = rows.rope if rows.rope.cos.shape[0] == 1 else Rope(*(x[:count] for x in rows.rope))
        span = rows.span.first_sequences(count)
        return replace(rows.of_each(lambda part: part[:count]), span=span, rope=rope)

    def _by_token(
        self,
        h: Tensor,
        rows: Rows,
        budget: Tensor,
        rule: Rule | None,
        cache: Cache,
        notes: Notes,
    ) -> CoreOutput:
        """Every token leaves the core at its own loop; what has left costs nothing more."""
        span, width = rows.span, h.shape[-1]
        shape, tokens = h.shape[:2], h.shape[0] * h.shape[1]
        numbers, budget = span.all_rows(), budget.flatten()
        if span.real is not None:  # padding never enters the core
            everywhere = replace(rows, rope=self._flat_rope(rows.rope, shape))
            rows = everywhere.keep(numbers, torch.arange(tokens, device=h.device))
            h = h.flatten(0, 1).index_select(0, numbers)
            budget = budget.index_select(0, numbers)
        final = h.new_zeros(tokens, width)
        latest = final  # every token's last state, for notes
        taken = torch.zeros(tokens, dtype=torch.int64, device=h.device)
        memory: Memory = () if rule is None else rule.start(len(numbers), h.reshape(-1, width))
        costs = None if rule is None else rule.ponder(memory)
        ponder = None if costs is None else h.new_zeros(tokens)
        fired = torch.zeros_like(budget, dtype=torch.bool)
        most = int(budget.max()) if len(budget) else 0
        loop = 0
        while loop < most:
            inside = Inside(h, rows, budget, rule, memory, fired)
            ran = self._until_exit(inside, loop, most, cache, notes)
            h, leaves, fired, memory, loop = ran
            after = h.reshape(-1, width)
            if notes.want_states:
                latest = latest.index_copy(0, numbers, after)
                notes.keep_state(loop, latest.unflatten(0, shape))
            gone = leaves.nonzero().squeeze(1)
            if not len(gone):
                continue
            who = numbers.index_select(0, gone)
            leaving, left = after.index_select(0, gone), select(memory, gone)
            final.index_copy_(0, who, leaving if rule is None else rule.output(leaving, left))
            taken.index_fill_(0, who, loop)
            costs = None if rule is None else rule.ponder(left)
            if ponder is not None and costs is not None:
                ponder.index_copy_(0, who, costs)
            cache.leave(span, who, loop - 1)
            if len(gone) == len(numbers):
                break
            kept = (~leaves).nonzero().squeeze(1)
            if rows.rope.cos.ndim == 4:
                rows = replace(rows, rope=self._flat_rope(rows.rope, shape))
            rows = rows.keep(kept, numbers)
            numbers, h = numbers.index_select(0, kept), after.index_select(0, kept)
            budget, fired = budget.index_select(0, kept), fired.index_select(0, kept)
            memory = select(memory, kept)
        return CoreOutput(
            final.unflatten(0, shape),
            taken.unflatten(0, shape),
            ponder=None if ponder is None else ponder.unflatten(0, shape),
        )

    def _until_exit(
        self, inside: Inside, loop: int, most: int, cache: Cache, notes: Notes
    ) -> tuple[Tensor, Tensor, Tensor, Memory, int]:
        """Run loops from number `loop` until a row may leave: one, or natively those with slots.

        Returns:
            States, which rows leave, on which the rule now fires, its memory, the next loop.
        """
        h, rows, budget, rule, memory, fired = inside
        end = cache.reach(loop, rows.span.sequence, most)
        decided = decided_here(rule)
        if decided and not notes.by_token and notes.given is None and takes(h):
            ahead = budget.clamp(max=end) - loop
            exits = Exits((decided,), ahead, fired, memory[0] if memory else None)
            done = run_loops(self, h, rows, exits.loops, cache, start=loop, exits=exits)
            if done is not None:
                h, every = done
                for done_loop, chosen in enumerate(every, start=loop):
                    notes.count(chosen, _number(done_loop, h))
                loop += exits.ran
                memory = (exits.quiet,) if memory else memory
                return h, exits.fired | (budget == loop), exits.fires, memory, loop
        choices, slot = notes.choices(loop, rows.numbers), cache.slot_of(loop)
        number = _number(loop, h)
        new, chosen = self.one_loop(h, rows, number, cache.core, slot, choices)
        notes.count(chosen, number)
        notes.route(chosen, rows.numbers)
        last = budget == loop + 1
        if rule is None:
            return new, last, fired, memory, loop + 1
        before, after = (x.reshape(-1, h.shape[-1]) for x in (h, new))
        fires, memory = rule.decide(before, after, memory, last)
        return new, fired | last, fires, memory, loop + 1

    @staticmethod
    def _flat_rope(rope: Rope, shape: torch.Size) -> Rope:
        """One row of angles for each token: `(tokens, 1, half)`."""
        return Rope(*(x.expand(*shape, *x.shape[2:]).flatten(0, 1) for x in rope))

    def _by_token_with_gradient(
        self, h: Tensor, rows: Rows, budget: Tensor, rule: Rule | None, notes: Notes
    ) -> CoreOutput:
        """As `_by_token`, differentiable: tokens that have left are held, not removed.

        This is how a model is trained to read the keys of tokens that left early, and how the
        rule `act` is learned.
        """
        shape, width = h.shape[:2], h.shape[-1]
        stores = [Frozen() for _ in self.layers]
        active = torch.ones(shape, dtype=torch.bool, device=h.device)
        if rows.span.real is not None:
            active = rows.span.real
        taken = torch.zeros(shape, dtype=torch.int64, device=h.device)
        memory: Memory = () if rule is None else rule.start(active.numel(), h.reshape(-1, width))
        fired = torch.zeros_like(active)
        for loop in range(int(budget.max())):
            number = _number(loop, h)
            stores = [store.after(active) for store in stores]
            choices = notes.choices(loop, None)
            new, chosen = self.one_loop(h, rows, number, stores, 0, choices)
            chosen = [choice[active] for choice in chosen]
            notes.count(chosen, number)
            notes.route(chosen, active.flatten().nonzero().squeeze(1))
            taken = taken + active
            last = budget == loop + 1
            leaves = last
            if rule is not None:
                flat = (h.reshape(-1, width), new.reshape(-1, width))
                exits, updated = rule.decide(*flat, memory, last.flatten())
                memory = tuple(
                    torch.where(active.flatten().view(-1, *[1] * (m.ndim - 1)), u, m)
                    for u, m in zip(updated, memory or updated, strict=True)
                )
                leaves, fired = fired | last, exits.view(shape)
            h = torch.where(active.unsqueeze(-1), new, h)
            notes.keep_state(loop + 1, h)
            active = active & ~leaves
            if not bool(active.any()):
                break
        costs = None
        if rule is not None:
            h = rule.output(h.reshape(-1, width), memory).view_as(h)
            costs = rule.ponder(memory)
        return CoreOutput(h, taken, ponder=None if costs is None else costs.view(shape))

    def experts_layers(self) -> list[Experts]:
        """The expert layers, in order; empty for a dense core."""
        parts = [layer.feed_forward for layer in self.layers]
        return [part for part in parts if isinstance(part, Experts)]

    def rebalance(self, loads: Int[Tensor, "loops layers experts"] | None) -> None:
        """Move every router's bias by one optimizer step's loads, all loops together.

        Args:
            loads: `out.loads` of the step's whole batch; None of a dense core. Where the batch is
                computed in parts, or by several processes, whose loops may differ, the sum of
                their `loads.sum(0, keepdim=True)`.

        Raises:
            InputError: they are not this core's.
        """
        layers = self.experts_layers()
        if not layers and loads is not None:
            raise InputError("loads were given to a core without experts: leave them None")
        if not layers:
            return
        wanted = (len(layers), self.config.experts)
        if not isinstance(loads, Tensor) or tuple(loads.shape[1:]) != wanted:
            shape = tuple(loads.shape) if isinstance(loads, Tensor) else None
            raise InputError(f"loads has shape {shape}, must be (loops, *{wanted}), as out.loads")
        for layer, counts in zip(layers, loads.sum(0), strict=True):
            layer.router.rebalance(counts)

    def flops(self, keys: int, *, decoding: bool = False) -> int:
        """Floating-point operations of one loop per token that sees `keys` keys, forward."""
        layers = [layer.flops(keys, decoding=decoding) for layer in self.layers]  # type: ignore[operator]
        return int(self.injection.flops() + sum(layers))


def _number(loop: int, h: Tensor) -> Int[Tensor, ""]:
    """A loop's number as a tensor, beside the states; made when it is reached, as few are."""
    return torch.full((), loop, device=h.device)


def _carried_on(
    routing: Int[Tensor, "loops layers batch sequence chosen"],
) -> Int[Tensor, "loops layers batch sequence chosen"]:
    """Let a token that had left (-1) go on with the experts it had last; padding has none."""
    filled = [routing[0].clamp(min=0)]
    for loop in routing[1:]:
        filled.append(torch.where(loop < 0, filled[-1], loop))
    return torch.stack(filled)
