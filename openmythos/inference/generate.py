"""Generation as it is: prefill; then draw, append, repeat. The reference for anything faster.

Draws are those of `openmythos.inference.noise`, by seed, row and position. So with one seed a row
is what the engine writes as the choice of its number, where logits agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.errors import InputError
from openmythos.inference.noise import draw_at
from openmythos.inference.sampling import Sampling, with_text
from openmythos.inference.thinking import Thinking
from openmythos.model.call import check_call
from openmythos.model.transformer import OpenMythos
from openmythos.numbers import at_least, whole


class NewToken(NamedTuple):
    """One step of generation, for every sequence of the batch."""

    token_ids: Int[Tensor, " batch"]
    loops: Int[Tensor, " batch"]
    """Loops that the position took which each token was drawn from."""


def generate(
    model: OpenMythos,
    token_ids: Int[Tensor, "batch prompt"],
    *,
    max_new_tokens: int,
    thinking: Thinking | None = None,
    sampling: Sampling | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    end_id: int | None = None,
) -> Iterator[NewToken]:
    """Check what is asked, then yield new tokens one by one, for as long as the caller takes them.

    Args:
        model: in evaluation mode.
        token_ids: int64 prompts; shorter ones padded, with False in `mask`.
        max_new_tokens: how many to make.
        thinking: loops, halting and the cache's policy.
        sampling: how tokens are drawn. Rows have draws of their own; without a seed, one is drawn
            from torch's generator.
        mask: `(batch, prompt)` bool, True where a prompt has text.
        vocab_size: ids from here on are never drawn, because the tokenizer has no text for them;
            default: the model's.
        end_id: the end-of-document token, which is not drawn right behind itself; see `not_empty`.

    Raises:
        InputError: prompt and new tokens together exceed the model's max_length, or an
            argument does not fit.
    """
    thinking, sampling = thinking or Thinking(), sampling or Sampling()
    asked = thinking.loops_of(model.config)
    loops = whole(asked)
    if loops is None:
        raise InputError(f"loops={asked!r} must be an integer, the budget of every token")
    check_call(model, token_ids, loops, None, mask, None, None, None)
    check_length(token_ids.shape[1], max_new_tokens, model.config.max_length)
    _check_prompts(mask)
    if vocab_size is not None and not at_least(vocab_size, 1):
        raise InputError(f"vocab_size={vocab_size!r} must be an integer of 1 or more")
    model.rule(thinking.halting, thinking.threshold)  # it checks both
    drawing = _Drawing(sampling, vocab_size, end_id)
    return _tokens(model, token_ids, max_new_tokens, loops, thinking, mask, drawing)


class _Drawing(NamedTuple):
    """How tokens are drawn from logits."""

    sampling: Sampling
    vocab_size: int | None
    end_id: int | None

    def seed(self) -> int:
        """The seed of one text."""
        seed = self.sampling.seed
        return int(torch.randint(2**63 - 1, ())) if seed is None else seed

    def draw(
        self, logits: Tensor, before: Tensor, seed: int, positions: Sequence[int]
    ) -> Int[Tensor, " batch"]:
        """Draw a token for each row, behind the tokens `before`, to stand at `positions`."""
        logits = with_text(logits, self.vocab_size)
        if self.end_id is not None and bool((before == self.end_id).any()):
            logits = torch.stack(
                [
                    not_empty(row, int(token), self.end_id)
                    for row, token in zip(logits, before, strict=True)
                ]
            )
        if self.sampling.temperature == 0:
            return logits.argmax(-1)  # as `draw_at` says, for all rows at once
        drawn = [
            draw_at(row, self.sampling, seed, number, position)
            for number, (row, position) in enumerate(zip(logits, positions, strict=True))
        ]
        return torch.tensor(drawn, device=logits.device)


def not_empty(logits: Float[Tensor, " vocab"], before: int, end_id: int) -> Tensor:
    """Let no document be empty: behind the end of one, another cannot end at once.

    Where nothing else may be drawn, it still can.
    """
    if before != end_id:
        return logits
    masked = logits.clone()
    masked[end_id] = -torch.inf
    return masked if bool(masked.isfinite().any()) else logits


@torch.inference_mode()
def _tokens(
    model: OpenMythos,
    token_ids: Tensor,
    max_new_tokens: int,
    loops: int,
    thinking: Thinking,
    mask: Tensor | None,
    drawing: _Drawing,
) -> Iterator[NewToken]:
    batch, prompt = token_ids.shape
    seed, lengths = drawing.seed(), _lengths(token_ids, mask)
    slots = thinking.slots_of(model.config)
    cache = model.new_cache(
        batch, prompt + max_new_tokens, loops=slots, policy=thinking.cache_policy
    )
    how = {"halting": thinking.halting, "threshold": thinking.threshold}
    for made in range(max_new_tokens):
        out = model(token_ids, loops, cache=cache, mask=mask, **how)
        last = _last_places(mask)
        rows = torch.arange(batch, device=token_ids.device)
        places = [length + made for length in lengths]
        new = drawing.draw(out.logits[rows, last], token_ids[rows, last], seed, places)
        yield NewToken(new, out.loops[rows, last])
        token_ids, mask = new.unsqueeze(1), None


def _lengths(token_ids: Tensor, mask: Tensor | None) -> list[int]:
    """Tokens of each prompt, without padding."""
    if mask is None:
        return [token_ids.shape[1]] * len(token_ids)
    lengths: list[int] = mask.sum(1).tolist()
    return lengths


def _last_places(mask: Tensor | None) -> Tensor | int:
    """Where each sequence's last real token stands in a call."""
    if mask is None:
        return -1
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return places.masked_fill(~mask, -1).amax(1)


def _check_prompts(mask: Tensor | None) -> None:
    """Raise `InputError` where a prompt is all padding: nothing says what comes first."""
    empty = [] if mask is None else (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"mask marks no token of prompt {empty[0]}: each must have one at least, such as the "
            "end-of-document token"
        )


def check_length(prompt: int, max_new_tokens: int, max_length: int) -> None:
    """Raise `InputError` unless prompt and new tokens fit into `max_length`."""
    if not at_least(max_new_tokens, 1):
        raise InputError(f"max_new_tokens={max_new_tokens!r} must be an integer of 1 or more")
    check_room(prompt, max_new_tokens, max_length)


def check_room(prompt: int, max_new_tokens: int, max_length: int) -> None:
    """Raise `InputError` unless they fit; no token may be asked for."""
    if prompt + max_new_tokens > max_length:
        raise InputError(
            f"max_new_tokens={max_new_tokens} after a prompt of {prompt} tokens must end by "
            f"max_length={max_length}: at most {max(0, max_length - prompt)} fit"
        )
