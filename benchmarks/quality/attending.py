"""Rows that a segment reads, and the cache attention over them, without a copy of the rows for each token of context.

A token reads its own rows and those of the tokens before it. Instead of shifting rows, which are large, queries and
logits are shifted, which are small: every row is read once, by the queries of all tokens that may attend to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from model_client.cache_attention import CacheAttention


def later(values: Tensor, by: int, fill: float = 0.0) -> Tensor:
    """(batch, T, ...) -> each token has what the token `by` before it had; the first ones `fill`."""
    if by == 0:
        return values
    return functional.pad(values, (0, 0) * (values.dim() - 2) + (by, 0), value=fill)[:, : values.shape[1]]


def sooner(values: Tensor, by: int) -> Tensor:
    """(batch, T, ...) -> each token has what the token `by` after it had; the last ones 0."""
    if by == 0:
        return values
    return functional.pad(values, (0, 0) * (values.dim() - 2) + (0, by))[:, by:]


@dataclass(frozen=True, slots=True)
class Read:
    """rows: (batch, T, E, d), of each token's own hits. is_live: (batch, T, E). keys: (batch, T, d) of the tokens."""

    rows: Tensor
    is_live: Tensor
    keys: Tensor
    context: int

    def entries(self) -> Tensor:
        """(batch * T, context * E): 0 where a token may attend, -1 where not; its own entries first."""
        live = [later(self.is_live.float(), back) > 0 for back in range(self.context)]
        return torch.where(torch.cat(live, dim=2), 0, -1).flatten(0, 1)


def attend(attention: CacheAttention, hidden: Tensor, read: Read) -> Tensor:
    """What cache attention adds: hidden (batch, T, hidden_size) -> the same shape."""
    (batch, length, _), context = hidden.shape, read.context
    folded = attention._fold_queries(hidden.flatten(0, 1), read.keys.flatten(0, 1))
    heads = folded.shape[1]
    folded = folded.view(batch, length, heads, -1)
    queries = torch.cat([sooner(folded, back) for back in range(context)], dim=2).flatten(0, 1)
    rows = read.rows.flatten(0, 1).to(folded.dtype)
    logits = torch.bmm(queries, rows.transpose(1, 2)).view(batch, length, context, heads, -1)
    shifted = [later(logits[:, :, back], back) for back in range(context)]
    shares = attention._shares(torch.cat(shifted, dim=-1).flatten(0, 1), read.entries()).to(rows.dtype)
    parts = shares.view(batch, length, heads, context, -1).unbind(dim=3)
    back_again = torch.cat([sooner(part, back) for back, part in enumerate(parts)], dim=2).flatten(0, 1)
    found = torch.bmm(back_again, rows).view(batch, length, context, heads, -1)
    total = sum(later(found[:, :, back], back) for back in range(context))
    return attention._unfold(total.flatten(0, 1)).to(hidden.dtype).view(hidden.shape)
