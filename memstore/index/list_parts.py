"""Parts on a GPU: inverted lists, learnt by k-means in torch, piece by piece, so that others get their turn.

Nothing of them is FAISS's, whose lists take memory of the device one by one and give it back so, each time waiting for
all that is under way there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from memstore.gpu.listing import listed
from memstore.index.build_stream import BuildStream
from memstore.index.clustering import centres, nearest_centres, pieces
from memstore.index.settings import CHUNK_ROWS, SAMPLES_A_CENTRE, list_shape
from memstore.index.stored_rows import random_rows
from memstore.types import Metric

if TYPE_CHECKING:
    from collections.abc import Callable

    from memstore.gpu.listing import Lists
    from memstore.index.generation import RowSource
    from memstore.types import MemorySpec

CLUSTERING_ROUNDS = 10
"""After so many rounds of k-means the lists hardly change."""


class ListBuilder:
    """See PartBuilder; its parts are Lists, which a ListRetriever searches. On any device."""

    can_mask = True

    def __init__(self, spec: MemorySpec, device: torch.device) -> None:
        self._shape = list_shape(spec)
        self._spec = spec
        self._device = device
        self._is_l2 = spec.metric is Metric.L2
        self._stream = BuildStream(device)

    def candidates(self, top_k: int) -> int:
        """Rows are scored as they are."""
        return top_k

    def prepare(self) -> None:
        """Builds lists of random rows, so that every kernel is loaded and the working memory is there.

        There are as many of them as are worked on together, and as many numbers of lists as a generation has rows.
        """
        shape = self._shape
        rows = random_rows(self._spec, self._device, min(shape.span, max(CHUNK_ROWS, _num_samples(shape.num_centres))))
        found = self.build(rows, lambda: None)
        with self._stream.at_work():
            owners = torch.arange(shape.span, device=self._device) % shape.num_centres
            listed(found.centres[: shape.num_centres], owners, 0, shape)

    def build(self, rows: RowSource, check: Callable[[], None]) -> Lists:
        """On a stream of its own, which is never far ahead of the device."""
        shape = self._shape

        def wait() -> None:
            self._stream.wait()
            check()

        with self._stream.at_work():
            num = min(shape.num_centres, len(rows))
            found = centres(rows.sample(_num_samples(num))[None], num, CLUSTERING_ROUNDS, self._is_l2, wait)
            assigned = torch.empty(len(rows), dtype=torch.int64, device=self._device)
            first = 0
            for chunk in rows.chunks():
                for some in pieces(chunk[None], num):
                    wait()
                    assigned[first : first + some.shape[1]] = nearest_centres(some, found, self._is_l2)[0]
                    first += some.shape[1]
            wait()
            lists = listed(found[0], assigned, rows.first % shape.span, shape)
            wait()
            return lists


def _num_samples(num_centres: int) -> int:
    """Rows that so many centres are learnt from."""
    return num_centres * SAMPLES_A_CENTRE
