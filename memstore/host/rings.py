"""The rings of a search as a table of numbers, one row for each sequence in each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memstore import ring
from memstore.host.compiling import kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memstore.search import SearchBatch
    from memstore.slab import Slab

NUM_COLUMNS = 7
FIRST_CELL, BEGIN, END, FIRST_QUERY, NUM_QUERIES, FIRST_LIST, NUM_PIECES = range(NUM_COLUMNS)
"""The cell of slot 0; positions [begin, end) that are seen; queries of the batch, layer by layer; lists of candidates.

The lists of a ring are piece by piece, and in each piece query by query.
"""

slot_of = kernel(ring.slot_of)


def numbers_of(header: tuple[int, ...], slab: Slab, batch: SearchBatch) -> NDArray[np.int64]:
    """The header of a job and a batch but for its queries, as `fill` takes it."""
    shape = slab.num_places, slab.capacity, len(batch.layers), len(batch.places)
    many = (*batch.layers, *batch.places, *batch.begins, *batch.ends, *batch.counts)
    return np.array((*header, *shape, *many), np.int64)


@kernel
def fill(rings: NDArray[Any], numbers: NDArray[Any]) -> int:
    """Fills in rings, (L * S, NUM_COLUMNS), but for their lists, and gives their capacity; of `numbers`, a batch."""
    num_places, capacity, num_layers, num_sequences = numbers[:4]
    layers = numbers[4 : 4 + num_layers]
    places, begins, ends, counts = numbers[4 + num_layers :].reshape(4, num_sequences)
    query = 0
    for number in range(len(rings)):
        ring, sequence = rings[number], number % num_sequences
        place = layers[number // num_sequences] * num_places + places[sequence]
        ring[FIRST_CELL], ring[FIRST_QUERY] = place * capacity, query
        ring[BEGIN], ring[END], ring[NUM_QUERIES] = begins[sequence], ends[sequence], counts[sequence]
        ring[FIRST_LIST], ring[NUM_PIECES] = 0, 0
        query += ring[NUM_QUERIES]
    return capacity
