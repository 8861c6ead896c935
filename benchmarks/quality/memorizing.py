"""Memorizing Transformers (arXiv 2203.08913) on the same store: one layer's keys and values, kNN for each head.

Kept: the layer's own keys (before the rotary embedding) and values. Trained: a copy of its query projection, and each
head's gate between what it reads nearby and what it reads in memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.quality.ring import exact_top, likeness

if TYPE_CHECKING:
    from benchmarks.quality.ring import Ring


UNIT_SCALE = 10.0  # of the products of unit vectors, at first


class MemorizingWeights(nn.Module):
    """The trained part: queries (heads * head_dim, hidden_size) and a gate logit and a sharpness for each head."""

    def __init__(self, attention: Any, init: str = "model") -> None:
        """init: "unit" compares directions, as the paper does, "open" begins with gates half open."""
        super().__init__()
        self.is_unit = init == "unit"
        self.head_dim = int(attention.head_dim)
        source = attention.q_proj.weight
        self.num_heads = source.shape[0] // self.head_dim
        self.queries = nn.Linear(source.shape[1], source.shape[0], bias=False, device=source.device)
        with torch.no_grad():
            self.queries.weight.copy_(source)
        self.gate = nn.Parameter(torch.full((self.num_heads,), -2.0 * (init != "open"), device=source.device))
        sharpness = math.log(UNIT_SCALE * self.head_dim**0.5) if self.is_unit else 0.0
        self.sharpness = nn.Parameter(torch.full((self.num_heads,), sharpness, device=source.device))

    def heads(self, flat: Tensor) -> Tensor:
        """(..., heads * head_dim) -> (..., heads, head_dim)."""
        return flat.unflatten(-1, (self.num_heads, self.head_dim))

    def states(self, hidden: Tensor, attention: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of (..., hidden_size), each (..., heads, head_dim)."""
        keys, values = attention.k_proj(hidden).detach(), attention.v_proj(hidden).detach()
        queries, keys = self.heads(self.queries(hidden)), self._shared(keys)
        if self.is_unit:
            queries, keys = functional.normalize(queries, dim=-1), functional.normalize(keys, dim=-1)
        return queries, keys, self._shared(values)

    def _shared(self, flat: Tensor) -> Tensor:
        """Heads of keys or values, each as often as query heads share it."""
        given = flat.unflatten(-1, (-1, self.head_dim))
        return given.repeat_interleave(self.num_heads // given.shape[-2], dim=-2)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, is_live: Tensor) -> Tensor:
        """(n, heads, d), (n, heads, k, d) twice, (n, heads, k) -> (n, heads * d), zero where nothing is live."""
        scale = self.head_dim**-0.5 * self.sharpness.exp()[:, None]
        logits = torch.einsum("nhd,nhkd->nhk", queries, keys.to(queries.dtype)).float() * scale
        shares = torch.softmax(logits.masked_fill(~is_live, torch.finfo(torch.float32).min), dim=-1)
        shares = shares.masked_fill(~is_live, 0.0).to(values.dtype)
        return torch.einsum("nhk,nhkd->nhd", shares, values).flatten(-2)

    def mix(self, local: Tensor, remembered: Tensor, has_memory: Tensor) -> Tensor:
        """local: (batch, T, heads * d), what enters the output projection; has_memory: (batch, T, 1)."""
        share = torch.sigmoid(self.gate).repeat_interleave(self.head_dim) * has_memory
        mixed: Tensor = local + (share * (remembered.to(local.dtype) - local)).to(local.dtype)
        return mixed

    def read_ring(self, hidden: Tensor, attention: Any, ring: Ring, top_k: int) -> tuple[Tensor, Tensor]:
        """What the segment reads, (batch, T, heads * d), and whether there was anything; then appends its own rows."""
        queries, keys, values = self.states(hidden, attention)
        batch, length = hidden.shape[:2]
        rows = torch.arange(batch, device=hidden.device)[:, None, None]
        is_empty = ring.is_empty()
        read = []
        for head in range(self.num_heads):
            with torch.no_grad():
                dtype = torch.float16 if queries.is_cuda else queries.dtype
                asked = queries[:, :, head].detach().to(dtype)
                slots = exact_top(likeness(asked, ring.key[:, :, head].to(dtype), is_empty), top_k)
            is_live = ~is_empty.gather(1, slots.flatten(1)).view(slots.shape)
            found = (ring.key[rows, slots, head], ring.value[rows, slots, head])
            read.append((queries[:, :, head], *found, is_live))
        q, k, v, live = (torch.stack(parts, dim=2).flatten(0, 1) for parts in zip(*read, strict=True))
        output = self.attend(q, k, v, live).view(batch, length, -1)
        has_memory = (ring.next > 0)[:, None, None].expand(batch, length, 1)
        ring.append(key=keys, value=values)
        return output, has_memory
