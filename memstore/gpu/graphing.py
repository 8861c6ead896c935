"""Graphs over the rows of generations: what they are like, and one of them as a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class GraphShape:
    """Generation n is what the positions [n * span, (n + 1) * span) have of it; a row has num_links links.

    num_met: rows that a walk keeps, a power of two, at most MOST_HITS. num_generations: that are live at once in a
    place. stride: every so many rows there is one that walks may begin at. nowhere: what the elements of those are
    that are not there.
    """

    span: int
    num_links: int
    num_met: int
    num_generations: int
    stride: int
    nowhere: float = 0.0

    @property
    def num_entries(self) -> int:
        """Of a generation."""
        return -(-self.span // self.stride)


class Graph(NamedTuple):
    """Of one generation in one layer. links: (rows, num_links) int32, node by node; first: the node of the first row.

    A node is a position counted from the first one of the generation's span. -1 for no link. entries: (num_entries,
    dim) as rows are stored, every `stride`-th node.
    """

    links: torch.Tensor
    entries: torch.Tensor
    first: int
