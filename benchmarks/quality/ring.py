"""Ring: the memory as training sees it, and what is found in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def exact_top(scores: Tensor, top_k: int, tile: int = 64) -> Tensor:
    """The columns of the top_k largest of each row (..., C), best first: top tiles by maximum, then within them."""
    columns = scores.shape[-1]
    if columns % tile or columns // tile <= top_k:
        return scores.topk(min(top_k, columns), dim=-1).indices
    tiled = scores.unflatten(-1, (columns // tile, tile))
    tiles = tiled.amax(dim=-1).topk(top_k, dim=-1).indices
    within = torch.gather(tiled, -2, tiles[..., None].expand(*tiles.shape, tile)).flatten(-2)
    best = within.topk(top_k, dim=-1).indices
    return torch.gather(tiles, -1, best // tile) * tile + best % tile


def nearness(queries: Tensor, kept: Tensor, is_empty: Tensor) -> Tensor:
    """(B, T, d), (B, C, d), (B, C) -> (B, T, C): half the negative squared distance, -inf where empty.

    Two columns more do what terms beside the product would do, which would be read and written with all scores.
    """
    norms = torch.linalg.vector_norm(kept, dim=-1, dtype=torch.float32).square() / -2
    return likeness(queries, kept, is_empty, norms, -kept.shape[-1] / 2)


def likeness(
    queries: Tensor, kept: Tensor, is_empty: Tensor, terms: Tensor | float = 0.0, constant: float = 0.0
) -> Tensor:
    """(B, T, d), (B, C, d), (B, C) -> (B, T, C): products with terms (B, C) of the kept rows and a constant added."""
    extra = kept.new_zeros(*kept.shape[:-1], 8)
    bias = torch.zeros(is_empty.shape, device=kept.device) + terms
    extra[..., 0] = bias.masked_fill(is_empty, float("-inf")).to(kept.dtype)
    extra[..., 1] = constant
    ones = queries.new_zeros(*queries.shape[:-1], 8)
    ones[..., :2] = 1.0
    with torch.autocast(kept.device.type, enabled=False):
        return torch.bmm(torch.cat([queries, ones], dim=-1), torch.cat([kept, extra], dim=-1).transpose(1, 2))


class Ring(nn.Module):
    """FIFO of the states of a batch of documents on the device: the memory as training sees it.

    Rows lie at position % capacity. `next`: (batch,) positions given out. Every append is of `segment` rows, which
    divides the capacity. names: what is kept, (width,) each, as buffers (batch, capacity, *width).
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        segment: int,
        widths: dict[str, tuple[int, ...]],
        *,
        device: Any,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        if capacity % segment:
            raise ValueError(f"capacity {capacity} is no multiple of the segment {segment}")
        self.capacity, self.segment = capacity, segment
        for name, width in widths.items():
            kept = torch.zeros(batch, capacity, *width, dtype=dtype, device=device)
            self.register_buffer(name, kept, persistent=False)
        self.register_buffer("next", torch.zeros(batch, dtype=torch.int64, device=device), persistent=False)
        self.span: Tensor | None = None  # (batch,) entries that a row has, where they are fewer than the capacity
        self._rows = torch.arange(batch, device=device)[:, None]

    def begin(self, begun: Tensor) -> None:
        """Empties the rows where begun (batch,) is true."""
        self.next.mul_((~begun).long())

    def append(self, **rows: Tensor) -> None:
        """Each (batch, segment, *width)."""
        slots = self.next[:, None] % self.capacity + torch.arange(self.segment, device=self.next.device)
        for name, given in rows.items():
            kept = getattr(self, name)
            kept[self._rows, slots] = given.to(kept.dtype)
        self.next.add_(self.segment)

    def is_empty(self) -> Tensor:
        """(batch, capacity): slots that hold nothing yet."""
        slots = torch.arange(self.capacity, device=self.next.device)
        is_empty = slots >= self.next[:, None]
        if self.span is None:
            return is_empty
        age = (self.next[:, None] - 1 - slots) % self.capacity
        return is_empty | (age >= self.span[:, None])

    def neighbours(self, slots: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
        """Slots (batch, T, k) of hits -> slots and whether they are live, both (batch, T, k, before + 1 + after)."""
        end = self.next[:, None, None, None]
        first = (end - self.capacity).clamp_min(0)
        positions = first + (slots[..., None] - first) % self.capacity
        is_hit = positions < end
        positions = positions + torch.arange(-before, after + 1, device=slots.device)
        return positions % self.capacity, is_hit & (positions >= first) & (positions < end)


def widen(rows: Tensor, is_live: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(B, T, E, d), (B, T, E) -> (B, T, context * E, d): each token's rows and those of the tokens before it."""
    if context == 1:
        return rows, is_live
    shifted_rows, shifted_live = [rows], [is_live]
    for back in range(1, context):
        shifted_rows.append(functional.pad(rows, (0, 0, 0, 0, back, 0))[:, : rows.shape[1]])
        shifted_live.append(functional.pad(is_live, (0, 0, back, 0))[:, : rows.shape[1]])
    return torch.cat(shifted_rows, dim=2), torch.cat(shifted_live, dim=2)
