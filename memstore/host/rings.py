"""The rings of a search as a table of numbers, one row for each sequence in each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memstore import ring
from memstore.host import planning
from memstore.host.compiling import kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray


NUM_COLUMNS = 7
FIRST_CELL, BEGIN, END, FIRST_QUERY, NUM_QUERIES, FIRST_LIST, NUM_PIECES = range(NUM_COLUMNS)
"""The cell of slot 0; positions [begin, end) that are seen; queries of the batch, layer by layer; lists of candidates.

The lists of a ring are piece by piece, and in each piece query by query.
"""

slot_of = kernel(ring.slot_of)
steps_of = kernel(planning.steps_of)


@kernel
def fill(rings: NDArray[Any], sizes: NDArray[Any], numbers: NDArray[Any]) -> int:
    """Fills in rings, (L * S, NUM_COLUMNS), but for their lists, and gives their capacity.

    sizes: places, capacity, layers, sequences; numbers: of the batch layers, places, begins, ends, counts, maybe more.
    """
    num_places, capacity, num_layers, num_sequences = sizes
    layers = numbers[:num_layers]
    places, begins, ends, counts = numbers[num_layers : num_layers + 4 * num_sequences].reshape(4, num_sequences)
    query = 0
    for number in range(len(rings)):
        ring, sequence = rings[number], number % num_sequences
        place = layers[number // num_sequences] * num_places + places[sequence]
        ring[FIRST_CELL], ring[FIRST_QUERY] = place * capacity, query
        ring[BEGIN], ring[END], ring[NUM_QUERIES] = begins[sequence], ends[sequence], counts[sequence]
        ring[FIRST_LIST], ring[NUM_PIECES] = 0, 0
        query += ring[NUM_QUERIES]
    return capacity


@kernel
def are_of_lengths(rings: NDArray[Any], lengths: NDArray[Any]) -> bool:
    """Whether the first rings, one for each sequence, have so many steps of rows."""
    for number in range(len(lengths)):
        if steps_of(rings[number, END] - rings[number, BEGIN]) != lengths[number]:
            return False
    return True
