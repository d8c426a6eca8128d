"""Log-likelihoods of continuations, in batches; a context that several share is read once.

A batch's contexts, but for their last tokens, go into a cache. Each turn then reads one
continuation behind every context and rolls the cache back. A set of depths is scored one depth
after the other: with a cache they cannot share a run, and for depths that double this costs less
than twice the deepest alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from openmythos.errors import InputError
from openmythos.inference.sampling import with_text
from openmythos.inference.thinking import Thinking
from openmythos.model.call import check_loops
from openmythos.model.transformer import OpenMythos, cross_entropy
from openmythos.training.tokenizer import Tokenizer

MOST_TOKENS = 4096
"""Tokens in a batch, padding included; bounds the logits."""

MOST_SLOTS = 1 << 15
"""Tokens times loops in a batch; bounds the cache."""


@dataclass(frozen=True)
class Continuation:
    """Tokens to be scored behind a context of at least one."""

    context: tuple[int, ...]
    token_ids: tuple[int, ...]

    def cut(self, max_length: int) -> int:
        """Count the tokens of the context that do not fit before the continuation's last."""
        return max(0, len(self.context) + len(self.token_ids) - 1 - max_length)


@dataclass(frozen=True)
class Score:
    """How likely a model takes a continuation to be."""

    log_likelihood: float
    """Sum over its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens is the likeliest there."""
    loops: int
    """Loops taken to predict its tokens, all together."""


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
    """Turn contexts and continuations into tokens.

    A context begins with the end mark, as documents do in training. Spaces that end it go to the
    continuation, because a word's token begins with its space. The two are encoded apart, so that
    no token belongs to both.
    """
    kept = [context.rstrip() for context, _ in pairs]
    rest = [
        context[len(stripped) :] + continuation
        for (context, continuation), stripped in zip(pairs, kept, strict=True)
    ]
    contexts, continuations = tokenizer.encode_batch(kept), tokenizer.encode_batch(rest)
    return [
        Continuation((tokenizer.end_id, *before), tuple(after))
        for before, after in zip(contexts, continuations, strict=True)
    ]


def windows(one: Continuation, max_length: int) -> Iterator[Continuation]:
    """Yield parts of a continuation that a model of this length can take, every token scored once.

    One that fits is one part, its context cut on the left. A longer one is taken apart into parts
    of `max_length` tokens, each behind as much of what precedes it as fits.
    """
    whole = one.context + one.token_ids
    for start in range(len(one.context), len(whole), max_length):
        end = min(start + max_length, len(whole))
        yield Continuation(whole[max(0, end - max_length - 1) : start], whole[start:end])


@torch.inference_mode()
def score(
    model: OpenMythos,
    continuations: Sequence[Continuation],
    thinking: Thinking,
    *,
    vocab_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Score every continuation; equal ones once, so that their scores are equal to the bit.

    Args:
        model: in evaluation mode.
        continuations: what to score; may be longer than the model's max_length.
        thinking: loops, halting rule and threshold. The cache's policy plays no part.
        vocab_size: ids that the tokenizer has text for, which alone can stand anywhere; default:
            the model's.
        progress: called after each batch with the parts of different continuations done and all
            there are.

    Raises:
        InputError: loops or rule do not fit the model, or a token id is out of range.
    """
    loops = thinking.loops_of(model.config)
    check_loops(loops, 1, 1)
    _check_ids(continuations, vocab_size)
    # In another turn of a batch, or with other padding, the same one is rounded otherwise.
    numbers = {one: number for number, one in enumerate(dict.fromkeys(continuations))}
    parts = [
        (number, part)
        for one, number in numbers.items()
        for part in windows(one, model.config.max_length)
    ]
    scores = [Score(0.0, True, 0)] * len(numbers)
    done = 0
    for batch in _batches(parts, min(MOST_TOKENS, MOST_SLOTS // loops)):
        for number, new in _score_batch(model, batch, thinking, vocab_size):
            old = scores[number]
            scores[number] = Score(
                old.log_likelihood + new.log_likelihood,
                old.greedy and new.greedy,
                old.loops + new.loops,
            )
            done += 1
        if progress is not None:
            progress(done, len(parts))
    return [scores[numbers[one]] for one in continuations]


@dataclass(frozen=True)
class _Group:
    """A context and the tokens of all continuations behind it, each with its number."""

    context: tuple[int, ...]
    continuations: list[tuple[int, tuple[int, ...]]]

    @property
    def longest(self) -> int:
        return max(len(ids) for _, ids in self.continuations)

    def turn(self, turn: int) -> tuple[int, tuple[int, ...]]:
        """The continuation of a turn, or an empty one where there are no more."""
        return self.continuations[turn] if turn < len(self.continuations) else (-1, ())


def _batches(parts: Sequence[tuple[int, Continuation]], most_tokens: int) -> Iterator[list[_Group]]:
    """Group parts by context, and groups of similar length into batches of about so many tokens."""
    by_context: dict[object, _Group] = {}
    for place, (number, part) in enumerate(parts):
        # A single token is no context worth sharing: those are scored beside each other.
        key = part.context if len(part.context) > 1 else place
        group = by_context.setdefault(key, _Group(part.context, []))
        group.continuations.append((number, part.token_ids))
    groups = sorted(by_context.values(), key=lambda g: (len(g.context), g.longest), reverse=True)
    batch: list[_Group] = []
    for group in groups:
        length = len((batch or [group])[0].context) + max(g.longest for g in [*batch, group])
        if batch and (len(batch) + 1) * length > most_tokens:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _score_batch(
    model: OpenMythos, groups: Sequence[_Group], thinking: Thinking, vocab_size: int | None
) -> Iterator[tuple[int, Score]]:
    """Yield the number and score of every continuation of the groups."""
    device, loops = model.embed.weight.device, thinking.loops_of(model.config)
    rule = {"halting": thinking.halting, "threshold": thinking.threshold}
    room = max(len(group.context) - 1 + group.longest for group in groups)
    cache = model.new_cache(len(groups), room, loops=thinking.slots_of(model.config))
    shared, mask = _padded([group.context[:-1] for group in groups], device)
    if shared.numel():
        model(shared, loops, cache=cache, mask=mask, **rule)
    for turn in range(max(len(group.continuations) for group in groups)):
        # A group that has no more continuations pauses: its row is padding.
        rows = [group.turn(turn) for group in groups]
        last = [group.context[-1] for group in groups]
        seen = [(first, *ids)[: len(ids)] for first, (_, ids) in zip(last, rows, strict=True)]
        token_ids, mask = _padded(seen, device)
        targets, _ = _padded([ids for _, ids in rows], device)
        out = model(token_ids, loops, cache=cache, mask=mask, **rule)
        cache.rollback(mask.sum(1).tolist())
        logits = with_text(out.logits, vocab_size)
        losses = cross_entropy(logits, targets).cpu().double()  # not every GPU has float64
        nats = (losses * mask.cpu()).sum(1).tolist()
        greedy = ((logits.argmax(-1) == targets) | ~mask).all(1).tolist()
        taken = (out.loops * mask).sum(1).tolist()
        for (number, ids), loss, likeliest, took in zip(rows, nats, greedy, taken, strict=True):
            if ids:
                yield number, Score(-loss, likeliest, took)


def _check_ids(continuations: Sequence[Continuation], vocab_size: int | None) -> None:
    """Raise `InputError` where a token to be scored has no text; the model checks all others."""
    largest = max((max(one.token_ids, default=0) for one in continuations), default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise InputError(f"token_ids holds {largest}, must be below vocab_size={vocab_size}")


def _padded(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch sequence"], Bool[Tensor, "batch sequence"]]:
    """Lay rows out from the left, and say which tokens are no padding."""
    token_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(token_ids, dtype=torch.bool)
    for place, row in enumerate(rows):
        token_ids[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[place, : len(row)] = True
    return token_ids.to(device), mask.to(device)
