"""Rows of a reply that who asks has already: they are told by their positions, and their arrays left out."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from memstore.sequence import BatchPlan
    from memstore.types import Hits


def without_known(plan: BatchPlan, hits: Hits) -> Hits:
    """The hits of a plan, less the rows that its batch says are known.

    A row of a position is the same for as long as an epoch lasts, so what is known of another epoch counts for nothing.
    """
    known = plan.batch.known
    if not known or not hits.arrays:
        return hits
    epochs = [0 if part.sequence is None else part.sequence.epoch for part in plan.parts] * len(plan.batch.layers)
    bits = [group.bits if group.epoch == epoch else b"" for group, epoch in zip(known, epochs, strict=True)]
    if not any(bits):
        return hits
    is_known = _are_known(hits, [group.begin for group in known], bits)
    rest = (~is_known).nonzero().squeeze(1)
    if len(rest) == len(is_known):
        return hits
    arrays = {name: rows.index_select(0, rest) for name, rows in hits.arrays.items()}
    return replace(hits, arrays=arrays, left_out=is_known.to(torch.uint8))


def _are_known(hits: Hits, begins: list[int], bits: list[bytes]) -> torch.Tensor:
    """(U,) bool. begins: of each group, the position of the first of its bits."""
    device = hits.positions.device
    lengths = [8 * len(each) for each in bits]
    firsts = list(accumulate(lengths, initial=0))[:-1]
    groups = torch.tensor([begins, lengths, firsts], device=device)
    num_rows = len(hits.positions)
    of_row = groups.repeat_interleave(hits.row_splits.diff(), 1, output_size=num_rows)
    offsets = hits.positions - of_row[0]
    is_within = (offsets >= 0) & (offsets < of_row[1])
    at = torch.where(is_within, offsets + of_row[2], 0)
    content = torch.frombuffer(bytearray(b"".join(bits)), dtype=torch.uint8).to(device)
    return is_within & (content[at >> 3].long() >> (at & 7) & 1).bool()
