"""The logit lens: what the model would say after each loop, from one pass of its core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.inference.language_model import LanguageModel
from openmythos.inference.thinking import Thinking
from openmythos.model.transformer import cross_entropy


@dataclass(frozen=True, kw_only=True)
class Lens:
    """What stands at each place after each loop, read out through coda and head.

    Row t is the whole text read out after t + 1 loops, but a place's last row, at `loops - 1`, is
    what the next token is drawn from. Rows after it have no meaning.
    """

    loops: Int[Tensor, " sequence"]
    """Loops that each place took."""
    top: Int[Tensor, "loops sequence top"]
    """The likeliest next tokens, likeliest first."""
    probabilities: Float[Tensor, "loops sequence top"]
    entropy: Float[Tensor, "loops sequence"]
    """Of the next token, in nats."""
    losses: Float[Tensor, "loops sequence"]
    """Of the token that does come next, in nats; NaN at the last place."""
    experts: Int[Tensor, "loops layers sequence chosen"] | None
    """Chosen by each core layer; None for a dense core."""


@torch.inference_mode()
def look(lm: LanguageModel, token_ids: Sequence[int], *, thinking: Thinking, top: int) -> Lens:
    """Run a text through the core once and read out the states after every loop.

    One loop's logits are held at a time.

    Args:
        lm: the model; only read.
        token_ids: the text.
        thinking: loops, halting rule and threshold. The cache's policy plays no part.
        top: likeliest tokens to keep at each place.

    Raises:
        InputError: the model cannot take the tokens, loops, rule or threshold.
    """
    model, vocab = lm.model, lm.tokenizer.vocab_size
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
    loops = out.loops[0]
    final = out.logits[0, :, :vocab]
    rows = []
    for loop, states in enumerate(out.states):
        drawn_from = (loops == loop + 1).unsqueeze(-1)
        logits = torch.where(drawn_from, final, model.decode(states)[0, :, :vocab])
        rows.append(_row(logits, ids[0], min(top, vocab)))
    best, probabilities, entropy, losses = (
        torch.stack(part).cpu() for part in zip(*rows, strict=True)
    )
    return Lens(
        loops=loops.cpu(),
        top=best,
        probabilities=probabilities,
        entropy=entropy,
        losses=losses,
        experts=None if out.routing is None else out.routing[:, :, 0].cpu(),
    )


def _row(
    logits: Float[Tensor, "sequence vocab"], token_ids: Int[Tensor, " sequence"], top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Likeliest tokens, their probabilities, entropy and the next token's loss at each place."""
    logprobs = (logits.float() if logits.itemsize < 4 else logits).log_softmax(-1)
    probabilities, best = logprobs.exp().topk(top, -1)
    entropy = torch.special.entr(logprobs.exp()).sum(-1)
    losses = logprobs.new_full(token_ids.shape, float("nan"))
    losses[:-1] = cross_entropy(logits[:-1], token_ids[1:])
    return best, probabilities, entropy, losses
