"""k-means in torch, piece by piece: nothing that it asks of a device takes long, so that others get their turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

SCORES = {"cpu": 1 << 22, "cuda": 1 << 24}
"""Scores of points and centres that are made at a time, by type of device."""


def centres(points: torch.Tensor, num: int, rounds: int, is_l2: bool, check: Callable[[], None]) -> torch.Tensor:
    """(groups, num, d) float32: centres of each group of points by themselves. Calls `check` between pieces.

    points: (groups, n, d) float32, n >= num. is_l2: by distance; else by inner product, with centres of length 1.
    """
    step = points.shape[1] // num
    found = points[:, : step * num : step].contiguous()
    for _ in range(rounds):
        sums, counts = torch.zeros_like(found), torch.zeros_like(found[:, :, 0])
        for some in pieces(points, num):
            check()
            nearest = nearest_centres(some, found, is_l2)
            sums.scatter_add_(1, nearest[:, :, None].expand_as(some), some)
            counts.scatter_add_(1, nearest, torch.ones_like(some[:, :, 0]))
        means = sums / counts.clamp_(min=1)[:, :, None] if is_l2 else torch.nn.functional.normalize(sums, dim=-1)
        found = torch.where(counts[:, :, None] > 0, means, found)
    return found


def nearest_centres(points: torch.Tensor, found: torch.Tensor, is_l2: bool) -> torch.Tensor:
    """(groups, n) int64: the centre that each point belongs to."""
    if is_l2:
        return torch.baddbmm(found.square().sum(-1)[:, None], points, found.mT, beta=-0.5).argmax(-1)
    return torch.bmm(points, found.mT).argmax(-1)


def pieces(points: torch.Tensor, num: int) -> tuple[torch.Tensor, ...]:
    """The points, so many at a time that their scores with `num` centres are few."""
    step = max(SCORES[points.device.type] // (len(points) * num), 1)
    return torch.split(points, step, dim=1)
