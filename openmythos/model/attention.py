"""Attention kinds, and the table that names them.

Each declares what it keeps per token and slot (`kept`), and states its own floating-point
operations. Everything goes through torch's `scaled_dot_product_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from openmythos.config import MythosConfig
from openmythos.model.adapters import LoopLinear
from openmythos.model.cache import Declaration
from openmythos.model.norm import RMSNorm, rms_norm
from openmythos.model.rope import Rope, rotate
from openmythos.model.span import Place


class GroupedQueryAttention(nn.Module):
    """Several query heads share a key and value head (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: MythosConfig, lora_rank: int = 0) -> None:
        super().__init__()
        heads, kv_heads, width = config.num_heads, config.kv_heads or 0, config.head_dim or 0
        lora = lora_rank, config.lora_loops or 1
        self.num_heads, self.kv_heads, self.head_dim = heads, kv_heads, width
        self.pairing, self.eps = config.rope_pairing, config.norm_eps
        # One product and one rotation for queries, keys and values: at batch 1 the number of
        # operations is the time.
        self.qkv = LoopLinear(config.hidden_size, (heads + 2 * kv_heads) * width, *lora)
        self.out = LoopLinear(heads * width, config.hidden_size, *lora)
        turned = heads + kv_heads
        self.qk_scale = nn.Parameter(torch.ones(turned, width)) if config.qk_norm else None
        self.qk_bias = nn.Parameter(torch.zeros(turned, width)) if config.qk_bias else None

    @staticmethod
    def rope_dim(config: MythosConfig) -> int:
        """Channels of a head that are rotated."""
        return config.head_dim or 0

    @property
    def kept(self) -> Declaration:
        """What one token keeps in one slot."""
        return dict.fromkeys(("key", "value"), (self.kv_heads, self.head_dim))

    def forward(
        self,
        x: Float[Tensor, "*rows hidden"],
        rope: Rope,
        loop: Int[Tensor, "*leading"],
        place: Place,
    ) -> Float[Tensor, "*rows hidden"]:
        qkv = self.qkv(x, loop).unflatten(-1, (-1, self.head_dim))  # (*rows, heads + 2 kv, width)
        turned = self.num_heads + self.kv_heads
        qk, value = qkv.split([turned, self.kv_heads], dim=-2)
        if self.qk_bias is not None:
            qk = qk + self.qk_bias
        if self.qk_scale is not None:
            qk = rms_norm(qk, self.qk_scale, self.eps).to(value.dtype)
        query, key = rotate(qk, rope, self.pairing).split([self.num_heads, self.kv_heads], dim=-2)
        seen = place.keep({"key": key, "value": value})
        y = place.attend(query, seen["key"], seen["value"], self.head_dim**-0.5)
        return self.out(y.flatten(-2), loop)

    def fused_splits(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Parameters that hold several matrices: the axis and the pieces' sizes."""
        width, kv = self.head_dim, self.kv_heads
        return {"qkv.weight": (0, (self.num_heads * width, kv * width, kv * width))}

    def flops(self, keys: int, *, decoding: bool = False) -> int:
        """Floating-point operations per token that sees `keys` keys, forward."""
        return self.qkv.flops() + self.out.flops() + 4 * self.num_heads * self.head_dim * keys


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Keeps one normed latent and one rotated key per token, `kv_latent + rope_dim` numbers, never
    expanded in the cache. Products run expanded (keys and values per head, for many queries) or
    absorbed (queries mapped into the latent, for few), whichever takes fewer operations; both
    give the same result. With `qk_norm` each query head and the shared rotated key are
    normalised; the unrotated keys come from a normed latent already.
    """

    def __init__(self, config: MythosConfig, lora_rank: int = 0) -> None:
        super().__init__()
        lora = lora_rank, config.lora_loops or 1
        hidden, self.num_heads, self.eps = config.hidden_size, config.num_heads, config.norm_eps
        self.nope, self.rope, self.value = config.nope_dim, config.rope_dim, config.value_dim
        self.latent, self.pairing = config.kv_latent, config.rope_pairing
        self.absorb: bool | None = None
        queries = self.num_heads * (self.nope + self.rope)
        if config.q_latent:
            self.q_down: LoopLinear | None = LoopLinear(hidden, config.q_latent, *lora)
            self.q_norm: RMSNorm | None = RMSNorm(config.q_latent, config.norm_eps)
            self.q_up = LoopLinear(config.q_latent, queries, *lora)
        else:
            self.q_down = self.q_norm = None
            self.q_up = LoopLinear(hidden, queries, *lora)
        self.kv_down = LoopLinear(hidden, self.latent + self.rope, *lora)
        self.kv_norm = RMSNorm(self.latent, config.norm_eps)
        # No LoRA here: this map is absorbed into the query.
        self.kv_up = LoopLinear(self.latent, self.num_heads * (self.nope + self.value))
        self.out = LoopLinear(self.num_heads * self.value, hidden, *lora)
        self.q_scale = self.k_scale = None
        if config.qk_norm:
            self.q_scale = nn.Parameter(torch.ones(self.num_heads, self.nope + self.rope))
            self.k_scale = nn.Parameter(torch.ones(self.rope))

    @staticmethod
    def rope_dim(config: MythosConfig) -> int:
        """Channels of a head that are rotated."""
        return config.rope_dim

    @property
    def kept(self) -> Declaration:
        """What one token keeps in one slot: latent and rotated key side by side."""
        return {"latent": (self.latent + self.rope,)}

    def forward(
        self,
        x: Float[Tensor, "*rows hidden"],
        rope: Rope,
        loop: Int[Tensor, "*leading"],
        place: Place,
    ) -> Float[Tensor, "*rows hidden"]:
        seen = place.keep({"latent": self._latent(x, rope, loop)})["latent"]
        nope, turned = self._query(x, rope, loop)
        queries = place.span.widest if place.span.rows is not None else place.span.sequence
        scale = (self.nope + self.rope) ** -0.5
        # In a deterministic call always, because the other form's product is over all keys.
        if place.span.alone is not None or self._absorbed(queries, seen.shape[1]):
            y = self._attend_absorbed(nope, turned, seen, place, scale)
        else:
            y = self._attend_expanded(nope, turned, seen, place, scale)
        return self.out(y.flatten(-2), loop)

    def _latent(self, x: Tensor, rope: Rope, loop: Tensor) -> Tensor:
        latent, key = self.kv_down(x, loop).split([self.latent, self.rope], dim=-1)
        if self.k_scale is not None:
            key = rms_norm(key, self.k_scale, self.eps).to(key.dtype)
        key = rotate(key.unsqueeze(-2), rope, self.pairing).squeeze(-2)
        return torch.cat([self.kv_norm(latent).to(key.dtype), key], dim=-1)

    def _query(self, x: Tensor, rope: Rope, loop: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_down is not None and self.q_norm is not None:
            x = self.q_norm(self.q_down(x, loop))
        query = self.q_up(x, loop).unflatten(-1, (self.num_heads, -1))
        if self.q_scale is not None:
            query = rms_norm(query, self.q_scale, self.eps).to(query.dtype)
        nope, turned = query.split([self.nope, self.rope], dim=-1)
        return nope, rotate(turned, rope, self.pairing)

    def _absorbed(self, queries: int, keys: int) -> bool:
        """Whether the absorbed form takes fewer operations for so many queries and keys."""
        if self.absorb is not None:
            return self.absorb
        per_head = self.latent * (self.nope + self.value)
        expanded = keys * per_head + queries * keys * (self.nope + self.rope + self.value)
        absorbed = queries * per_head + queries * keys * (2 * self.latent + self.rope)
        return absorbed < expanded

    def _maps(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The latent's maps to keys `(heads, nope, latent)` and values `(heads, value, latent)`."""
        weight = self.kv_up.weight.to(like.dtype).unflatten(0, (self.num_heads, -1))
        key, value = weight.split([self.nope, self.value], dim=1)
        return key, value

    def _attend_absorbed(
        self, nope: Tensor, turned: Tensor, seen: Tensor, place: Place, scale: float
    ) -> Tensor:
        to_key, to_value = self._maps(nope)
        query = torch.einsum("...hn,hnl->...hl", nope, to_key)
        key = seen.unsqueeze(-2)  # (sequences, keys, 1, latent + rope): one head for all queries
        y = place.attend(torch.cat([query, turned], -1), key, key[..., : self.latent], scale)
        return torch.einsum("...hl,hvl->...hv", y.to(nope.dtype), to_value)

    def _attend_expanded(
        self, nope: Tensor, turned: Tensor, seen: Tensor, place: Place, scale: float
    ) -> Tensor:
        latent, shared = seen.split([self.latent, self.rope], dim=-1)
        both = F.linear(latent, self.kv_up.weight).unflatten(-1, (self.num_heads, -1))
        key, value = both.split([self.nope, self.value], dim=-1)
        shared = shared.unsqueeze(-2).expand(*key.shape[:-1], self.rope).to(key.dtype)
        query = torch.cat([nope, turned], dim=-1)
        return place.attend(query, torch.cat([key, shared], dim=-1), value, scale)

    def fused_splits(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Parameters that hold several matrices: the axis and the pieces' sizes."""
        return {"kv_down.weight": (0, (self.latent, self.rope))}

    def flops(self, keys: int, *, decoding: bool = False) -> int:
        """Floating-point operations per token that sees `keys` keys, forward.

        Of a text read at once, expanded; `decoding`: of one token behind a cache, absorbed.
        """
        maps = [self.q_up, self.kv_down, self.kv_up, self.out]
        if self.q_down is not None:
            maps.append(self.q_down)
        widths = self.nope + self.rope + self.value
        if decoding:
            widths = 2 * self.latent + self.rope
        return sum(m.flops() for m in maps) + 2 * self.num_heads * widths * keys


ATTENTION: dict[str, Any] = {"gqa": GroupedQueryAttention, "mla": LatentAttention}
