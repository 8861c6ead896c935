"""Threads that share out pieces of work, of which none waits long for another.

The thread that asks works too. When nothing is left to begin, it waits for what others have begun as long as it might
take itself, and then does that again: a thread may have lost its core to another process for much longer.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from itertools import count
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Piece = TypeVar("Piece")


class Crew(Generic[Piece]):
    """Does pieces by `work`, which several threads may call at once, for the same piece even, with the same effect.

    It may still be at work, in vain, on a piece that was done long ago.
    """

    def __init__(self, work: Callable[[Piece], None]) -> None:
        self._work = work
        self._pool: ThreadPoolExecutor | None = None

    def do(self, pieces: Sequence[Piece], num_threads: int, patience_s: float) -> None:
        """Returns when every piece is done. Raises what `work` raises. patience_s: what a piece takes, about."""
        numbers = count()
        is_done = [False] * len(pieces)

        def do_some() -> None:
            while (number := next(numbers)) < len(pieces):
                self._work(pieces[number])
                is_done[number] = True

        num_helpers = min(num_threads, len(pieces)) - 1
        if num_helpers > 0 and self._pool is None:
            self._pool = ThreadPoolExecutor(num_threads - 1, thread_name_prefix="memstore-search")
        helpers = [self._pool.submit(do_some) for _ in range(num_helpers) if self._pool]
        do_some()
        wait([helper for helper in helpers if not helper.cancel()], patience_s)
        for piece, is_it in zip(pieces, is_done, strict=True):
            if not is_it:
                self._work(piece)
