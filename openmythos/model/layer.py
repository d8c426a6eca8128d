"""One layer: attention, then feed-forward, each with its norms and its residual."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from openmythos.config import MythosConfig
from openmythos.model.attention import ATTENTION
from openmythos.model.experts import Experts
from openmythos.model.feed_forward import FeedForward
from openmythos.model.native.run import run_layer
from openmythos.model.norm import RMSNorm
from openmythos.model.rope import Rope
from openmythos.model.span import Place


class Layer(nn.Module):
    """Attention and a feed-forward; in the core, experts where the config has them.

    The residual stream keeps its dtype (fp32 in the core); what is added comes in the weights'.
    """

    def __init__(self, config: MythosConfig, in_core: bool = False) -> None:
        super().__init__()
        rank = config.lora_rank if in_core else 0
        width, eps = config.hidden_size, config.norm_eps
        self.placement = config.norm
        self.attention = ATTENTION[config.attention](config, rank)
        self.feed_forward: FeedForward | Experts
        self.routed = in_core and config.experts > 0
        if self.routed:
            self.feed_forward = Experts(config)
        else:
            size, loops = config.feed_forward_size or 0, config.lora_loops or 1
            self.feed_forward = FeedForward(config.feed_forward, width, size, rank, loops)
        self.attention_norm = RMSNorm(width, eps)
        self.feed_forward_norm = RMSNorm(width, eps)
        outer = config.norm != "pre"
        self.attention_out_norm = RMSNorm(width, eps) if outer else None
        self.feed_forward_out_norm = RMSNorm(width, eps) if outer else None

    def forward(
        self,
        h: Float[Tensor, "*rows hidden"],
        rope: Rope,
        loop: Int[Tensor, "*leading"],
        place: Place,
        given: Int[Tensor, "*rows chosen"] | None = None,
    ) -> tuple[Float[Tensor, "*rows hidden"], Int[Tensor, "*rows chosen"] | None]:
        """Return the new state and, of an experts layer, the experts that each token took.

        Args:
            h: `(batch, sequence, hidden)`, or `(rows, hidden)` once tokens have left the core.
            rope: angles of the same rows.
            loop: 0-based loop, one for all or one for each entry of the first axis.
            place: where keys go and what they see.
            given: experts to take instead of the router's choice.
        """
        done = run_layer(self, h, rope, loop, place, given)
        if done is not None:
            return done
        y = self.attention(self.attention_norm(h), rope, loop, place)
        h = self._residual(h, y, self.attention_out_norm)
        x, chosen = self.feed_forward_norm(h), None
        if self.routed:  # whatever an adapter of another library has put around the experts
            alone = None if place.span.alone is None else len(place.span.alone)
            y, chosen = self.feed_forward(x, loop, given, alone)
        else:
            y = self.feed_forward(x, loop)
        return self._residual(h, y, self.feed_forward_out_norm), chosen

    def _residual(self, h: Tensor, y: Tensor, norm: RMSNorm | None) -> Tensor:
        if norm is None:
            return h + y
        return h + norm(y) if self.placement == "peri" else norm(h + y).to(h.dtype)

    def flops(self, keys: int, *, decoding: bool = False) -> int:
        """Floating-point operations per token that sees `keys` keys, forward."""
        return int(self.attention.flops(keys, decoding=decoding) + self.feed_forward.flops())
