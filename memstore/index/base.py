"""The contract of an index, and what bounds all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import Hits, IndexCounts, RetrieveOptions

SCRATCH_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
"""What a search may take beside its result, by type of device; or the scores of one query where that is more."""

ONE_THREAD = 32_768
"""Elements up to which torch works in the thread that asks, on the host: threads that are busy elsewhere are dear."""


class Steady(Protocol):
    """A retrieval that is asked again and again. Its tensors stay where they are, so it can be part of a CUDA graph.

    queries: (L, N, dim), filled before `launch`. index: (L, N, k, w) int32 into the rows, -1 where there is none.
    positions: (U,) int64. arrays: name -> (U, ...). Of the U rows there is room for, the first ones are in use.
    """

    queries: torch.Tensor
    index: torch.Tensor
    positions: torch.Tensor
    arrays: Mapping[str, torch.Tensor]

    def fits(self, slab: Slab, batch: SearchBatch) -> bool:
        """Whether `point` may be called with this batch, which differs from the first one in what its sequences see."""
        ...

    def point(self, slab: Slab, batch: SearchBatch) -> None:
        """From now on `launch` sees what the sequences of this batch see; its queries are not read."""
        ...

    def launch(self, slab: Slab) -> None:
        """Retrieves for `queries`. On a GPU nothing waits for it: it is done in the order of the current stream."""
        ...


class VectorIndex(Protocol):
    """Finds the `top_k` best rows for each query of a batch.

    It may keep something between calls, and is told what happens to the rows for that; all calls but `join` come from
    the device's thread. What an index with something of its own promises less than this, it says.

    is_told: False where the calls from `appended` on have no effect and can be left out.

    Gives positions (L, N, k) int64, -1 where fewer are visible, and scores (L, N, k) float32, -inf there; best first,
    lower positions first among equal scores. Exact: queries in float32 against the rows as they are stored, every
    product and sum in float32 or better, and l2 scores summed over (query - row)^2. Which rows are given at the end of
    the k is not said where float32 cannot tell them apart: where their scores differ by less than the rounding of
    |query|^2 + |row|^2 (l2) or |query| |row| (ip). Scratch is bounded by SCRATCH_BYTES. Vectors whose squared norm
    exceeds 1e37 may overflow and are then ranked arbitrarily.
    """

    is_told: bool

    def search(self, slab: Slab, batch: SearchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Searches; reads the slab and the batch and changes neither. Raises torch.OutOfMemoryError."""
        ...

    def retrieve(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions, groups: NDArray[np.int64]) -> Hits:
        """What `search` finds, with its windows, every row that occurs in them once.

        groups: (L, S), the group of each sequence in each layer, every number below L * S once: the order of the groups
        in the reply. Raises torch.OutOfMemoryError.
        """
        ...

    def steady(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions) -> Steady | None:
        """What retrieves for batches like this one, layer by layer; None where it has nothing better than `retrieve`.

        Raises torch.OutOfMemoryError.
        """
        ...

    def appended(self, slab: Slab, place: int, begin: int, end: int) -> None:
        """The rows of a place are written up to position `end`, and [begin, end) is live now. Cannot fail."""
        ...

    def forgotten(self, place: int) -> None:
        """Nothing of a place is live any more; its positions may begin anew."""
        ...

    def forked(self, slab: Slab, source: int, target: int, begin: int, end: int) -> None:
        """An empty place has got the rows [begin, end) of another one, at the same positions."""
        ...

    def counts(self) -> IndexCounts | None:
        """What is kept; None where nothing ever is."""
        ...

    def close(self) -> None:
        """Ends all background work, and returns at once; from now on nothing is kept."""
        ...

    def join(self) -> None:
        """After `close`, in any thread: returns when the device has back what the index took."""
        ...


class Stateless:
    """The part of VectorIndex of an index that keeps nothing between calls."""

    is_told = False

    def steady(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions) -> Steady | None:
        """Nothing is."""
        return None

    def appended(self, slab: Slab, place: int, begin: int, end: int) -> None:
        """Nothing is kept."""

    def forgotten(self, place: int) -> None:
        """Nothing was kept."""

    def forked(self, slab: Slab, source: int, target: int, begin: int, end: int) -> None:
        """Nothing is kept."""

    def counts(self) -> IndexCounts | None:
        """Nothing is kept."""
        return None

    def close(self) -> None:
        """Nothing was kept."""

    def join(self) -> None:
        """Nothing was kept."""


def no_candidates(batch: SearchBatch) -> torch.Tensor:
    """(L, N, k) int64 of -1, to be filled with positions."""
    shape = (*batch.queries.shape[:2], batch.top_k)
    return torch.full(shape, -1, dtype=torch.int64, device=batch.queries.device)
