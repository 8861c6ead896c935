"""A search that costs nothing: what it finds is made beforehand. For measuring all that is around a search.

Run as a module it is `memstore serve` with that search; it takes the same flags.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from memstore.__main__ import main
from memstore.index import INDEXES
from memstore.index.base import Stateless
from memstore.types import Hits, IndexKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from memstore.index.base import SearchBatch
    from memstore.slab import Slab
    from memstore.types import RetrieveOptions


class CannedIndex(Stateless):
    """See VectorIndex. Every neighbour of every hit is a row of its own, so that replies are as large as can be."""

    def search(self, slab: Slab, batch: SearchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Nobody asks for it."""
        raise NotImplementedError

    def retrieve(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions, groups: NDArray[np.int64]) -> Hits:
        """The same at every call."""
        del groups
        layers, queries, dim = batch.queries.shape
        return _hits((layers, queries, options.top_k, options.window), len(batch.places), dim, slab.keys.dtype)


@lru_cache
def _hits(shape: tuple[int, int, int, int], num_sequences: int, dim: int, dtype: torch.dtype) -> Hits:
    num_rows = torch.Size(shape).numel()
    num_groups = shape[0] * num_sequences
    return Hits(
        row_splits=torch.arange(num_groups + 1) * (num_rows // num_groups),
        positions=torch.arange(num_rows),
        index=torch.arange(num_rows, dtype=torch.int32).view(shape),
        scores=torch.zeros(shape[:3]),
        arrays={"key": torch.randn(num_rows, dim).to(dtype)},
    )


@contextmanager
def canned() -> Iterator[None]:
    """Memories that are made within the block search so."""
    real = INDEXES[IndexKind.EXACT]
    INDEXES[IndexKind.EXACT] = CannedIndex
    try:
        yield
    finally:
        INDEXES[IndexKind.EXACT] = real


if __name__ == "__main__":
    with canned():
        sys.exit(main(["serve", *sys.argv[1:]]))
