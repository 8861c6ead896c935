"""The ring: where the positions of a bounded sequence lie. The only module that takes a modulo.

    [0, begin) forgotten | [begin, next) live | [next, ...) not yet written,    begin = max(next - capacity, 0)

A position p lies in slot p % capacity, so a live range is at most two runs of slots, cut at the end of the slab (the
seam). Arithmetic works alike on numbers, on integer tensors and on integer arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Positions = TypeVar("Positions", int, torch.Tensor, "NDArray[np.int64]")


@dataclass(frozen=True, slots=True)
class Run:
    """Positions [position, position + length) that lie in slots [slot, slot + length)."""

    slot: int
    position: int
    length: int


def slot_of(position: Positions, capacity: int) -> Positions:
    """The slot of a position, or of each of a tensor of them."""
    return position % capacity


def runs(begin: int, end: int, capacity: int) -> tuple[Run, ...]:
    """The runs of slots, at most two, in which positions [begin, end) lie, oldest first.

    No run where end <= begin. Raises ValueError for more than `capacity` positions.
    """
    length = max(end - begin, 0)
    if length > capacity:
        raise ValueError(f"{length} positions in a ring of {capacity}")
    slot = slot_of(begin, capacity)
    head = min(length, capacity - slot)
    both = (Run(slot, begin, head), Run(0, begin + head, length - head))
    return tuple(run for run in both if run.length)


def newest_positions(slots: torch.Tensor, end: torch.Tensor, capacity: int) -> torch.Tensor:
    """The largest position below `end` that lies in a slot; negative where there is none.

    slots, end: int64, broadcast against each other.
    """
    last = end - 1
    return last - slot_of(last - slots, capacity)
