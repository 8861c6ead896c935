"""The best of many scores without sorting them all, by the largest score of each tile.

Each of the k best scores lies in one of the k tiles with the largest maxima: were it in another, k tiles would each
hold a score at least as large. So the maxima are ranked, and then only the scores of k tiles.
"""

from __future__ import annotations

import torch

TILE = 32
"""Consecutive slots a tile."""


def best_slots(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best slots of each query.

    scores: (G, slots, n) float32, without NaN. Gives scores and slots, (G, n, min(top_k, slots)), unordered.
    """
    num_groups, num_slots, num_queries = scores.shape
    num_tiles = num_slots // TILE
    if num_tiles <= 2 * top_k:
        best = scores.mT.topk(min(top_k, num_slots), dim=-1)
        return best.values, best.indices
    tiled = scores[:, : num_tiles * TILE].view(num_groups, num_tiles, TILE, num_queries)
    maxima = tiled.amax(2).mT.contiguous()
    tiles = maxima.topk(top_k, dim=-1, sorted=False).indices
    slots = (tiles[..., None] * TILE + torch.arange(TILE, device=scores.device)).flatten(2)
    rest = torch.arange(num_tiles * TILE, num_slots, device=scores.device)
    slots = torch.cat((slots, rest.expand(num_groups, num_queries, -1)), 2)
    best = scores.gather(1, slots.mT).mT.topk(top_k, dim=-1, sorted=False)
    return best.values, slots.gather(2, best.indices)
