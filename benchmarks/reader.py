"""Reader: reads memory once and does nothing else, shared out among threads as a search on the host is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memstore.host.compiling import kernel
from memstore.host.helpers import Helpers
from memstore.host.lowering import draw, raised, ring_bell

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIECE = 128 << 10
"""Words of eight bytes that a thread draws at a time."""

NEXT, NUM_PIECES, FIRST_FLAG = range(3)


class Reader:
    """Reads (n,) int64 words with the caller's thread and some helpers."""

    def __init__(self, words: NDArray[np.int64], num_helpers: int) -> None:
        self._words = words
        self._num_helpers = num_helpers
        self._helpers = Helpers()
        self._num_pieces = -(-len(words) // PIECE)

    def read(self) -> int:
        """The sum of all words."""
        numbers = np.zeros(FIRST_FLAG + 2 * self._num_pieces, np.int64)
        bells = self._helpers.tell(self._num_helpers, help_read, numbers, self._words)
        return int(read_all(numbers, self._words, bells, self._num_pieces))


@kernel
def read_all(numbers: NDArray[Any], words: NDArray[Any], bells: NDArray[Any], num_pieces: int) -> int:
    """Wakes the helpers, reads with them, and waits for them."""
    numbers[NUM_PIECES] = num_pieces
    for bell in bells:
        ring_bell(bell)
    help_read(numbers, words)
    total = 0
    for number in range(num_pieces):
        while not raised(numbers, FIRST_FLAG + number):
            pass
        total += numbers[FIRST_FLAG + num_pieces + number]
    return total


@kernel
def help_read(numbers: NDArray[Any], words: NDArray[Any]) -> None:
    """Reads pieces until none is left to begin."""
    while True:
        number = draw(numbers, NEXT)
        if number >= numbers[NUM_PIECES]:
            return
        total = 0
        piece = words[number * PIECE : (number + 1) * PIECE]
        for at in range(len(piece)):
            total += piece[at]
        numbers[FIRST_FLAG + numbers[NUM_PIECES] + number] = total
        draw(numbers, FIRST_FLAG + number)
