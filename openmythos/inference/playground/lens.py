"""The logit lens: what the model would say after each loop, from one pass of its core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.inference.language_model import LanguageModel
from openmythos.inference.thinking import Thinking
from openmythos.model.transformer import cross_entropy


class Unwanted(Exception):  # noqa: N818 - nothing has gone wrong
    """Nobody waits for what is worked at."""


@dataclass(frozen=True, kw_only=True)
class Lens:
    """What stands at each place after each loop, read out through coda and head.

    Places are those of the text from the first one that was asked for. Row t is the whole text read
    out after t + 1 loops, but a place's last row, at `loops - 1`, is what the next token is drawn
    from. Rows after it have no meaning.
    """

    loops: Int[Tensor, " places"]
    """Loops that each place took."""
    top: Int[Tensor, "loops places top"]
    """The likeliest next tokens, likeliest first."""
    probabilities: Float[Tensor, "loops places top"]
    entropy: Float[Tensor, "loops places"]
    """Of the next token, in nats."""
    losses: Float[Tensor, "loops places"]
    """Of the token that does come next, in nats; NaN at the last place."""
    experts: Int[Tensor, "loops layers places chosen"] | None
    """Chosen by each core layer; None for a dense core."""


@torch.inference_mode()
def look(
    lm: LanguageModel,
    token_ids: Sequence[int],
    *,
    thinking: Thinking,
    top: int,
    first: int = 0,
    unwanted: Callable[[], bool] = lambda: False,
) -> Lens:
    """Run a text through the core once and read out the states after every loop.

    One loop's logits are held at a time, of the places that are shown.

    Args:
        lm: the model; only read.
        token_ids: the text.
        thinking: loops, halting rule and threshold. The cache's policy plays no part.
        top: likeliest tokens to keep at each place.
        first: the place to show first; those before are read all the same.
        unwanted: asked before the core runs and before each loop is read out.

    Raises:
        Unwanted: `unwanted` said so.
        InputError: the model cannot take the tokens, loops, rule or threshold.
    """
    model, vocab = lm.model, lm.tokenizer.vocab_size
    _check_wanted(unwanted)
    ids = torch.tensor([list(token_ids)], device=model.embed.weight.device)
    out = model(
        ids,
        thinking.loops,
        halting=thinking.halting,
        threshold=thinking.threshold,
        return_states=True,
        return_routing=True,
    )
    assert out.states is not None
    shown, following = slice(first, None), ids[0, first + 1 :]
    loops, final = out.loops[0, shown], out.logits[0, shown, :vocab]
    lens = _empty(final, loops, count=len(out.states), top=min(top, vocab))
    for loop, states in enumerate(out.states):
        _check_wanted(unwanted)
        drawn_from = (loops == loop + 1).unsqueeze(-1)
        logits = torch.where(drawn_from, final, model.decode(states, shown=shown)[0, :, :vocab])
        _fill(lens, loop, logits, following)
    experts = None if out.routing is None else out.routing[:, :, 0, shown]
    return replace(lens, experts=experts)


def _check_wanted(unwanted: Callable[[], bool]) -> None:
    if unwanted():
        raise Unwanted


def _empty(
    logits: Float[Tensor, "places vocab"], loops: Int[Tensor, " places"], *, count: int, top: int
) -> Lens:
    """A lens to be filled row by row.

    Its tensors are made at once: small ones that are kept between large ones that are not would
    take 45 MB more in each loop, because memory in pieces is not given back.
    """
    wide = logits.new_empty(0, dtype=torch.promote_types(logits.dtype, torch.float32))
    places = len(logits)
    return Lens(
        loops=loops,
        top=loops.new_empty(count, places, top),
        probabilities=wide.new_empty(count, places, top),
        entropy=wide.new_empty(count, places),
        losses=wide.new_full((count, places), float("nan")),
        experts=None,
    )


def _fill(
    lens: Lens,
    loop: int,
    logits: Float[Tensor, "places vocab"],
    following: Int[Tensor, " following"],
) -> None:
    """Write one row: likeliest tokens, entropy, and the loss of the token that follows."""
    logprobs = logits.to(lens.losses.dtype).log_softmax(-1)
    probabilities = logprobs.exp()
    lens.probabilities[loop], lens.top[loop] = probabilities.topk(lens.top.shape[-1], -1)
    lens.entropy[loop] = torch.special.entr(probabilities).sum(-1)
    lens.losses[loop, : len(following)] = cross_entropy(logits[: len(following)], following)
