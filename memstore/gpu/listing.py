"""Inverted lists as tensors: how many there are of a generation, and the rows of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class ListShape:
    """Generation n is what the positions [n * span, (n + 1) * span) have of it; it has num_together lists.

    num_centres: that rows are assigned to. width: rows of a list at most, a power of two from 32. num_chosen: lists
    that are read for a query, of all generations of a place. num_generations: that are live at once in a place.
    nowhere: what the elements of centres are that have no rows.
    """

    span: int
    num_centres: int
    width: int
    num_chosen: int
    num_generations: int
    nowhere: float = 0.0

    @property
    def num_together(self) -> int:
        """As many as any distribution of rows among the centres can need."""
        return self.num_centres + -(-self.span // self.width)


class Lists(NamedTuple):
    """Of one generation in one layer. centres: (num_together, dim); rows: (num_together, width) int32.

    rows: positions counted from the first one of the generation's span, -1 for none.
    """

    centres: torch.Tensor
    rows: torch.Tensor


def listed(centres: torch.Tensor, assigned: torch.Tensor, first: int, shape: ListShape) -> Lists:
    """The lists of rows. Nothing waits for a device.

    centres: (num_centres, dim). assigned: (n,) int64, the centre of each row; first: the number of the first row. A
    centre with more rows than a list has room for has several lists, which share them evenly. Lists that are not
    needed for that are empty, and as far away as can be.
    """
    num_centres, num_lists = len(centres), shape.num_together
    counts = torch.zeros(num_centres, dtype=torch.int64, device=assigned.device)
    counts.scatter_add_(0, assigned, torch.ones_like(assigned))
    lists = (counts + shape.width - 1).div(shape.width, rounding_mode="floor")
    left = num_lists - lists.sum()
    order = assigned.argsort(stable=True)
    centre = assigned[order]
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[centre]
    list_of = (lists.cumsum(0) - lists)[centre] + rank % lists[centre]
    place = list_of * shape.width + rank.div(lists[centre], rounding_mode="floor")
    rows = torch.full((num_lists * shape.width,), -1, dtype=torch.int32, device=order.device)
    rows[place] = (order + first).int()
    owners = torch.cat((lists, left[None]))
    with_none = torch.cat((centres, torch.full_like(centres[:1], shape.nowhere)))
    return Lists(with_none.repeat_interleave(owners, 0, output_size=num_lists), rows.view(num_lists, -1))
