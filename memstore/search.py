"""Search: what is looked for where, for any way to find it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchBatch:
    """One search of a ragged batch: S sequences, their queries one behind the other, in each of L layers.

    queries: (L, N, dim) floating, on the slab's device, finite. layers: (L,) layers of the slab. The rest is (S,):
    place in the slab, number of queries, and the positions [begin, end) that they see.
    """

    queries: torch.Tensor
    layers: tuple[int, ...]
    places: tuple[int, ...]
    counts: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    top_k: int

    @property
    def groups(self) -> NDArray[np.int64]:
        """(L, S): a group for each sequence in each layer, layer by layer, as a reply to this batch alone has them."""
        return np.arange(len(self.layers) * len(self.places)).reshape(len(self.layers), -1)

    def sequences(self) -> Iterator[tuple[int, int, int]]:
        """(sequence, first query, end of its queries) of each sequence that has queries and sees something."""
        first = 0
        for sequence, count in enumerate(self.counts):
            if count and self.begins[sequence] < self.ends[sequence]:
                yield sequence, first, first + count
            first += count

    def per_query(self, *values: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        """Tables of one column a sequence, (rows, S) -> (rows, N) int64 on the device, one a query; they cross once."""
        table = np.repeat(np.concatenate(values), self.counts, axis=1)
        on_device = torch.from_numpy(table).to(self.queries.device)
        return torch.split_with_sizes(on_device, [len(rows) for rows in values])  # quicker than torch.split
