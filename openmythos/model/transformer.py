"""The page: token ids, embedding, prelude, core, coda, head, logits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from openmythos.config import CachePolicy, HaltingKind, MythosConfig, RopePairing, WeightsKind
from openmythos.errors import InputError
from openmythos.model.attention import ATTENTION
from openmythos.model.cache import Cache
from openmythos.model.call import (
    check_cache_sizes,
    check_call,
    check_decode,
    check_model,
    check_states,
    check_window,
    floating,
    states_wanted,
)
from openmythos.model.core import Core
from openmythos.model.halting import Rule, make_rule
from openmythos.model.initialise import initialise
from openmythos.model.int8 import Int8Weight
from openmythos.model.layer import Layer
from openmythos.model.native.linear import FewRowsLinear
from openmythos.model.native.run import run_after, run_before, run_readout
from openmythos.model.native.whole import plan_of
from openmythos.model.norm import RMSNorm
from openmythos.model.notes import CoreOutput, Notes
from openmythos.model.rope import Rope, rope_rows, rope_table
from openmythos.model.span import Place, Span
from openmythos.model.tied import tie, tie_again
from openmythos.numbers import whole


@dataclass
class MythosOutput:
    """What a forward pass returns."""

    logits: Float[Tensor, "batch sequence vocab"]
    loops: Int[Tensor, "batch sequence"]
    """Loops each token took."""
    notes: Notes | None = None
    """Experts chosen, which `loads` counts when asked."""
    routing: Int[Tensor, "loops layers batch sequence chosen"] | None = None
    """With `return_routing`: experts chosen; -1 where a token had left the core."""
    states: Float[Tensor, "loops batch sequence hidden"] | None = None
    """With `return_states`: the state after every loop that was run, or after those wanted."""
    ponder: Float[Tensor, "batch sequence"] | None = None
    """With `halting="act"`: Graves' ponder cost."""

    @property
    def loads(self) -> Int[Tensor, "loops layers experts"] | None:
        """Tokens each expert got, by loop and core layer; None for a dense core."""
        return None if self.notes is None else self.notes.loads()


class OpenMythos(nn.Module):
    """A recurrent-depth transformer: prelude once, core as many loops as wanted, coda once.

    Args:
        config: the shape.
        seed: of the initialisation, which depends on it and on each tensor's name alone.

    Raises:
        InputError: `config` is no config, or `seed` no integer.
    """

    def __init__(self, config: MythosConfig, seed: int = 0) -> None:
        super().__init__()
        check_model(config, seed)
        self.config = config
        width, eps = config.hidden_size, config.norm_eps
        self.embed = nn.Embedding(config.vocab_size, width)
        self.prelude = nn.ModuleList(Layer(config) for _ in range(config.prelude_layers))
        self.prelude_norm = RMSNorm(width, eps) if config.prelude_norm else None
        self.core = Core(config)
        self.core_output: nn.Module | None = None
        if config.core_output == "linear":
            self.core_output = FewRowsLinear(width, width, bias=False)
        elif config.core_output == "norm":
            self.core_output = RMSNorm(width, eps)
        self.coda = nn.ModuleList(Layer(config) for _ in range(config.coda_layers))
        self.norm = RMSNorm(width, eps) if config.final_norm else None
        self.head = FewRowsLinear(width, config.vocab_size, bias=False)
        if config.tie_head:
            tie(self)
        self.identity = object()  # caches know whose they are
        self.reset_parameters(seed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OpenMythos:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.config.tie_head:  # a cast int8 matrix is a new one in each of its places
            tie_again(self)
        return self

    def forward(
        self,
        token_ids: Int[Tensor, "batch sequence"],
        loops: int | Int[Tensor, " batch"] | Int[Tensor, "batch sequence"] | None = None,
        *,
        cache: Cache | None = None,
        halting: HaltingKind = "none",
        threshold: float | None = None,
        mask: Bool[Tensor, "batch sequence"] | None = None,
        positions: Int[Tensor, "batch sequence"] | None = None,
        h0: Float[Tensor, "batch sequence hidden"] | None = None,
        routing: Int[Tensor, "loops layers batch sequence chosen"] | None = None,
        backprop_loops: int | None = None,
        return_states: bool | Collection[int] = False,
        return_routing: bool = False,
    ) -> MythosOutput:
        """Compute logits for every token.

        Args:
            token_ids: int64, from 0 to vocab_size - 1.
            loops: budget of every token, of each sequence, or of each token; at least 1.
                Default: `config.mean_loops`. May exceed the trained depth.
            cache: kept keys and values of earlier calls; extended in place, without gradient.
            halting: when tokens leave the core before their budget ends; see `HALTING`.
            threshold: the rule's bound; None is its own default.
            mask: False marks padding, which nothing sees and no load counts.
            positions: rotary positions; default: each token's place in its sequence.
            h0: first state, for experiments.
            routing: experts to take instead of the routers' choice; the last loop's serve for
                all later loops.
            backprop_loops: loops with gradient, the last ones; None: all.
            return_states: also return the state after every loop; given loop counts, only the
                states after so many, in their order of size. A token that has left has its last
                state: with a rule, or `loops` of their own, a count may be more than were run.
            return_routing: also return the experts chosen.

        Raises:
            InputError: token ids, loops, mask or another argument do not fit.
            CacheError: the cache is another model's, or of another batch size, or too short.
        """
        loops = self.config.mean_loops if loops is None else loops
        number = whole(loops)
        loops = loops if number is None else number
        check_call(self, token_ids, loops, cache, mask, positions, h0, routing)
        wanted = states_wanted(return_states, loops, halting)
        noted = bool(wanted) or return_routing
        check_window(backprop_loops, loops, halting, noted)
        rule = self.rule(halting, threshold)
        plain = all(given is None for given in (mask, positions, h0, routing, rule)) and not noted
        if cache is not None and isinstance(loops, int) and plain:
            done = self._in_one_call(token_ids, loops, cache)
            if done is not None:
                return done
        certain = loops if rule is None else 1  # with a rule, slots come as loops reach them
        span = self._span(token_ids, cache, mask, certain)
        rope = self._rope(span, positions)
        places = self._outer_places(span, cache)

        with torch.set_grad_enabled(cache is None and torch.is_grad_enabled()):
            e = self.before_core(token_ids, rope, places)
            core: CoreOutput = self.core(
                e,
                rope,
                span,
                loops,
                rule=rule,
                cache=cache,
                new_cache=lambda: self._scratch(span, e),
                h0=h0,
                backprop_loops=backprop_loops,
                routing=routing,
                return_states=wanted,
                return_routing=return_routing,
            )
            logits = self.readout(self.after_core(core.h, rope, places))

        if cache is not None:
            cache.commit(span)
        taken = core.loops if span.real is None else core.loops * span.real
        return MythosOutput(logits, taken, core.notes, core.routing, core.states, core.ponder)

    def _in_one_call(self, token_ids: Tensor, loops: int, cache: Cache) -> MythosOutput | None:
        """Run everything in one native call where few tokens allow it."""
        batch, sequence = token_ids.shape
        cache.make_room(sequence, None, loops)
        plan = plan_of(self, cache, token_ids, loops)
        if plan is None:
            return None
        start = cache.length
        logits, choice = plan.run(token_ids, loops, start, self._rope_from(start, sequence))
        cache.advance([sequence] * batch)
        notes = Notes(self.config.experts, self.config.core_layers, (batch, sequence))
        if choice is not None:
            notes.count(list(choice.unbind(1)), torch.arange(loops))
        taken = torch.full((batch, sequence), loops)
        return MythosOutput(logits.to(self.head.weight.dtype), taken, notes)

    def before_core(
        self, token_ids: Int[Tensor, "*rows"], rope: Rope, places: Iterator[Place]
    ) -> Float[Tensor, "*rows hidden"]:
        """Embed tokens and run the prelude: e, which enters every loop."""
        own = [next(places) for _ in self.prelude]
        done = run_before(self, token_ids, rope, own)
        if done is not None:
            return done
        once = torch.zeros((), dtype=torch.int64, device=token_ids.device)
        x = self.embed(token_ids) * self.config.embedding_scale
        for layer, place in zip(self.prelude, own, strict=True):
            x, _ = layer(x, rope, once, place)
        e = x if self.prelude_norm is None else self.prelude_norm(x)
        return e

    def after_core(
        self, h: Float[Tensor, "*rows hidden"], rope: Rope, places: Iterator[Place]
    ) -> Float[Tensor, "*rows hidden"]:
        """Run the coda on the core's states; `readout` makes logits of the result."""
        own = [next(places) for _ in self.coda]
        done = run_after(self, h, rope, own)
        if done is not None:
            return done
        y = h.to(self.embed.weight.dtype)
        y = y if self.core_output is None else self.core_output(y)
        once = torch.zeros((), dtype=torch.int64, device=h.device)
        for layer, place in zip(self.coda, own, strict=True):
            y, _ = layer(y, rope, once, place)
        return y

    def encode(
        self,
        token_ids: Int[Tensor, "batch sequence"],
        *,
        mask: Bool[Tensor, "batch sequence"] | None = None,
        positions: Int[Tensor, "batch sequence"] | None = None,
    ) -> Float[Tensor, "batch sequence hidden"]:
        """Compute e, which enters every loop: embedding and prelude, without the core.

        Arguments are those of `forward`.

        Raises:
            InputError: they do not fit.
        """
        check_call(self, token_ids, 1, None, mask, positions, None, None)
        batch, sequence = token_ids.shape
        span = Span.fresh(batch, sequence, mask, token_ids.device)
        places = iter([Place(span)] * len(self.prelude))
        return self.before_core(token_ids, self._rope(span, positions), places)

    def decode(
        self,
        h: Float[Tensor, "batch sequence hidden"],
        *,
        mask: Bool[Tensor, "batch sequence"] | None = None,
        positions: Int[Tensor, "batch sequence"] | None = None,
        shown: slice = slice(None),
    ) -> Float[Tensor, "batch shown vocab"]:
        """Compute logits from states of the core, as `return_states` gives them: coda and head.

        One pass of the core thus serves every depth, and a gate learns from all of them. With
        `halting="act"` a call's logits are those of the weighted state, which `return_states` does
        not give: there `decode(out.states[-1])` is not `out.logits`.

        Args:
            h: one state for each token, of any floating dtype.
            mask: as in `forward`.
            positions: as in `forward`.
            shown: places whose logits are wanted; the coda runs over all of them. Default: all.

        Raises:
            InputError: they do not fit.
        """
        check_decode(h, mask, positions, self.config)
        span = Span.fresh(h.shape[0], h.shape[1], mask, h.device)
        places = iter([Place(span)] * len(self.coda))
        y = self.after_core(h, self._rope(span, positions), places)
        return self.readout(y[:, shown])

    def readout(self, y: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Norm and head: logits of a state, without the coda.

        Raises:
            InputError: `y` is not as wide as the model, or holds no floating numbers.
        """
        check_states("y", y, self.config)
        done = run_readout(self, y)
        if done is not None:
            return done
        y = y if self.norm is None else self.norm(y)
        logits = self.head(y.to(self.head.weight.dtype))
        return logits if self.config.logit_scale == 1 else logits * self.config.logit_scale

    def rule(self, halting: str, threshold: float | None = None) -> Rule | None:
        """Build a halting rule for this model; None where nothing ends a token but its budget.

        Args:
            halting: a key of `HALTING`.
            threshold: the rule's bound; None is its own default.

        Raises:
            InputError: there is no such rule, the model cannot follow it, or it cannot take the
                threshold.
        """
        return make_rule(halting, threshold, self.core.learned_exits(), self.readout)

    @property
    def cache_dtype(self) -> torch.dtype:
        """What keys and values are kept in: the weights' dtype, and bf16 beside int8 weights."""
        weight = self.embed.weight
        return torch.bfloat16 if isinstance(weight, Int8Weight) else weight.dtype

    def new_cache(
        self,
        batch_size: int = 1,
        max_length: int | None = None,
        *,
        loops: int | None = None,
        policy: CachePolicy = "per_loop",
        dtype: torch.dtype | str | None = None,
    ) -> Cache:
        """Make an empty cache for this model, on its device.

        Args:
            batch_size: sequences.
            max_length: tokens each may have; default: the config's.
            loops: slots to start with, more are added when a call runs more loops; default:
                `config.mean_loops`.
            policy: `per_loop` or `last`; see `Cache`.
            dtype: what keys and values are kept in, a floating one; default: `cache_dtype`.

        Raises:
            InputError: a size is below 1, the policy is unknown, or the dtype is no floating one.
        """
        length = self.config.max_length if max_length is None else max_length
        slots = self.config.mean_loops if loops is None else loops
        check_cache_sizes(self.config, batch_size, length, slots, policy)
        kept = self.cache_dtype if dtype is None else floating(dtype)
        try:
            return Cache(
                [layer.attention.kept for layer in [*self.prelude, *self.coda]],
                [layer.attention.kept for layer in self.core.layers],  # type: ignore[union-attr, misc]
                batch_size=batch_size,
                max_length=length,
                loops=slots,
                policy=policy,
                dtype=kept,
                device=self.embed.weight.device,
                owner=self.identity,
                weights=self.embed.weight.dtype,
            )
        except (RuntimeError, MemoryError) as error:
            raise InputError(
                f"loops={slots}, batch_size={batch_size} and max_length={length} must leave room "
                "for the cache in memory: ask for fewer, or for policy='last'"
            ) from error

    def _span(
        self, token_ids: Tensor, cache: Cache | None, mask: Tensor | None, loops: int | Tensor
    ) -> Span:
        batch, sequence = token_ids.shape
        if cache is None:
            return Span.fresh(batch, sequence, mask, token_ids.device)
        return cache.begin(sequence, mask, loops if isinstance(loops, int) else int(loops.max()))

    def _rope(self, span: Span, positions: Tensor | None) -> Rope:
        if positions is None and span.start is not None:  # the same for every sequence
            return self._rope_from(span.start, span.sequence)
        where = span.index if positions is None else positions
        return rope_table(where, *self.rope_kind()).per_head()

    def _rope_from(self, start: int, count: int) -> Rope:
        """Angles of `count` positions from `start` on."""
        return rope_rows(start, count, *self.rope_kind(), self.embed.weight.device).per_head()

    def rope_kind(self) -> tuple[int, float, RopePairing, torch.dtype]:
        """Return what `rope_table` needs beside positions."""
        config = self.config
        dim = ATTENTION[config.attention].rope_dim(config)
        return dim, config.rope_base, config.rope_pairing, self.embed.weight.dtype

    def _outer_places(self, span: Span, cache: Cache | None) -> Iterator[Place]:
        for number in range(len(self.prelude) + len(self.coda)):
            yield Place(span, None if cache is None else cache.outer[number])

    def _scratch(self, span: Span, e: Tensor) -> Cache:
        """A cache for one call, in which exited tokens leave their keys.

        All tokens still in the core are at the same loop and write before any reads, so that
        every loop can have the same slot: what has left stands there as it was when it left.
        """
        return Cache(
            [],
            [layer.attention.kept for layer in self.core.layers],  # type: ignore[union-attr, misc]
            batch_size=span.batch,
            max_length=span.keys,
            loops=1,
            policy="per_loop",
            dtype=e.dtype,
            device=e.device,
            owner=self.identity,
            grows=False,
        )

    def reset_parameters(self, seed: int = 0) -> None:
        """Initialise every tensor from `seed` and its own name, see `initialise`."""
        initialise(self, seed)
        if self.config.tie_head:
            tie_again(self)  # `to_empty` unties them

    def fused_splits(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Parameters that hold several matrices side by side: the axis and the pieces' sizes.

        An optimizer that works on matrices (Muon) treats each piece on its own.
        """
        splits: dict[str, tuple[int, tuple[int, ...]]] = {}
        for name, module in self.named_modules():
            own = getattr(module, "fused_splits", None) if module is not self else None
            if own is not None:
                splits |= {f"{name}.{key}": split for key, split in own().items()}
        return splits

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The depth-wise LoRA's parameters by name, for fine-tuning them alone."""
        return {name: p for name, p in self.named_parameters() if ".lora." in name}

    def flops(self, keys: int, loops: int, *, decoding: bool = False) -> int:
        """Floating-point operations per token that sees `keys` keys, forward at `loops` loops.

        Of a text read at once; `decoding`: of one token behind a cache.
        """
        layers = [*self.prelude, *self.coda]
        outer = sum(layer.flops(keys, decoding=decoding) for layer in layers)
        once = self.core.injection.flops_once()
        if self.config.core_output == "linear":
            once += 2 * self.config.hidden_size**2
        head = 2 * self.head.weight.numel()
        return int(outer + once + head + loops * self.core.flops(keys, decoding=decoding))

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: Any = None,
        weights: WeightsKind | None = None,
    ) -> None:
        """Write `config.json`, `model.safetensors` and, where given, `tokenizer.json`.

        Args:
            folder: made where it is not there.
            tokenizer: saved beside the model.
            weights: `fp32`, `bf16` (half as large) or `int8` (a quarter); see
                `openmythos.model.files`. Default: every tensor as it is.

        Raises:
            InputError: there are no such `weights`.
            CheckpointError: a file cannot be written, a weight is not finite, or parts of the model
                are of other dtypes than `model.to` gives.
        """
        from openmythos.model.files import save_model

        save_model(self, Path(folder), tokenizer, weights)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | str | None = None
    ) -> OpenMythos:
        """Read what `save_pretrained` wrote; no code in it is ever run.

        Args:
            folder: the model's. `openmythos.load` takes the names of shipped models too.
            dtype: cast to this one, or to that of this name (`"bfloat16"`). Default: fp32 where it
                was saved with `weights`, else the dtype it was saved in.

        Raises:
            CheckpointError: a file is missing, damaged or of another shape.
            InputError: `dtype` is none of the floating ones.
        """
        from openmythos.model.files import load_model

        return load_model(cls, Path(folder), dtype=dtype)


def cross_entropy(
    logits: Float[Tensor, "*rows vocab"], targets: Int[Tensor, "*rows"]
) -> Float[Tensor, "*rows"]:
    """Loss of every token in nats, in fp32 or wider."""
    wide = logits.float() if logits.itemsize < 4 else logits
    flat = F.cross_entropy(wide.flatten(0, -2), targets.flatten(), reduction="none")
    return flat.view(targets.shape)
