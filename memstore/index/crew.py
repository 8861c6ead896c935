"""Threads that share out pieces of work, of which none waits long for another.

The thread that asks works too. When nothing is left to begin, it waits for what others have begun as long as it might
take itself, and then does that again: a thread may have lost its core to another process for much longer.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from itertools import compress, count
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

Piece = TypeVar("Piece")


class Crew:
    """The thread that asks and, from the first time that there is more than one piece, its helpers."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def do(
        self, work: Callable[[Iterable[Piece]], None], pieces: Sequence[Piece], num_threads: int, patience_s: float
    ) -> None:
        """Returns when every piece is done by `work`, which each thread calls once, for pieces that come as it asks.

        Doing a piece twice, even at the same time, must have the same effect as doing it once; a helper may still be
        busy, in vain, with a piece that was done long ago. Raises what `work` raises. patience_s: what a piece takes.
        """
        numbers = count()
        is_left = [True] * len(pieces)

        def shared() -> Iterator[Piece]:
            while (number := next(numbers)) < len(pieces):
                yield pieces[number]
                is_left[number] = False

        num_helpers = min(num_threads, len(pieces)) - 1
        if num_helpers > 0 and self._pool is None:
            self._pool = ThreadPoolExecutor(num_threads - 1, thread_name_prefix="memstore-search")
        helpers = [self._pool.submit(work, shared()) for _ in range(num_helpers) if self._pool]
        work(shared())
        if helpers:
            wait([helper for helper in helpers if not helper.cancel()], patience_s)
            work(compress(pieces, is_left))
