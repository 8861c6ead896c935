"""Windows: the neighbours of each hit by position, and the distinct rows that a batch of them asks for.

A window never leaves the range [begin, end) that the retrieval sees, so it never joins the newest entry with the oldest
across the seam of the ring: what lies outside is masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class DistinctRows:
    """The rows of a batch, each once, grouped and sorted by position within a group.

    row_splits: (G + 1,) int64; rows of group g are [row_splits[g], row_splits[g + 1]). groups, offsets: (U,) int64.
    index: int32 of the shape of the windows, into the rows, -1 where masked.
    """

    row_splits: torch.Tensor
    groups: torch.Tensor
    offsets: torch.Tensor
    index: torch.Tensor


def window_offsets(
    positions: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, before: int, after: int
) -> torch.Tensor:
    """The neighbours of each hit as offsets from `begin`, in the order of positions, -1 where masked.

    positions: (L, N, k) int64, -1 for no hit; begin, end: (N,) int64, what each query sees. Gives (L, N, k, w) int64.
    """
    around = torch.arange(-before, after + 1, device=positions.device)
    offsets = (positions - begin[:, None])[..., None] + around
    is_seen = (offsets >= 0) & (offsets < (end - begin)[:, None, None]) & (positions >= 0)[..., None]
    return torch.where(is_seen, offsets, -1)


def distinct_rows(offsets: torch.Tensor, groups: torch.Tensor, num_groups: int, capacity: int) -> DistinctRows:
    """Each (group, offset) that occurs in `offsets`, once.

    offsets: (L, N, k, w) int64, in [0, capacity) or -1; groups: (L, N) int64 in [0, num_groups).
    """
    is_masked = offsets < 0
    beyond = num_groups * capacity
    rows = (groups[:, :, None, None] * capacity + offsets).masked_fill(is_masked, beyond)
    distinct, index = torch.unique(rows, return_inverse=True)
    bounds = torch.arange(num_groups + 1, device=offsets.device) * capacity
    row_splits = torch.searchsorted(distinct, bounds)
    distinct = distinct[: int(row_splits[-1])]
    row_groups = torch.div(distinct, capacity, rounding_mode="floor")
    return DistinctRows(
        row_splits=row_splits,
        groups=row_groups,
        offsets=distinct - row_groups * capacity,
        index=index.masked_fill(is_masked, -1).to(torch.int32),
    )
