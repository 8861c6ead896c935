"""Courtesy: how a thread leaves the cores to others, without a priority below theirs.

Whoever waits for a lock waits for the thread that holds it. One of low priority that others keep from its core holds
Python's lock for tens of milliseconds. So it has everybody's priority, and rests between two pieces of its work: the
longer, the longer it was kept waiting for a core, which says that others want one.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

REST_RATIO = 9
"""Of rest to waiting. Beside busy threads, which take turns, it is left with about a tenth of a core."""

SHORTEST_REST_S, LONGEST_REST_S = 0.001, 0.05
"""Shorter ones come together. A longest one, so that the work comes to an end."""

PIECE_S = 0.001
"""How long a thread works on before it looks whether others want its core."""

NICENESS = 10
"""Where the system does not say how long a thread has waited for a core."""

_WAITED = "/proc/thread-self/schedstat"
_MOST_BYTES = 128


class NotCounted(Exception):
    """This system does not say how long threads wait for a core."""


class Courtesy:
    """Of one thread, which alone uses it."""

    def __init__(self, waited_s: Callable[[], float], rest: Callable[[float], object]) -> None:
        """waited_s: seconds that the thread has waited for a core, so far. rest: does nothing for so many seconds."""
        self._waited_s = waited_s
        self._rest = rest
        self._repaid_s = waited_s()

    def give_way(self) -> None:
        """Rests, if others have kept the thread waiting since it rested last."""
        try:
            waited_s = self._waited_s()
        except OSError:  # no descriptor is left
            return
        owed_s = min(REST_RATIO * (waited_s - self._repaid_s), LONGEST_REST_S)
        if owed_s >= SHORTEST_REST_S:
            self._repaid_s = waited_s
            self._rest(owed_s)


class Paced:
    """A check between pieces of work, made once they have taken PIECE_S since the last one.

    One may wait for a retrieval, a hundred times as long as a small piece takes.
    """

    def __init__(self, check: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """clock: in seconds."""
        self._check = check
        self._clock = clock
        self._next = clock()

    def __call__(self) -> None:
        """Raises what the check does."""
        if self._clock() >= self._next:
            self._check()
            self._next = self._clock() + PIECE_S


def waited_for_a_core_s() -> float:
    """Of this thread, runnable and on no core, as Linux counts it (/proc/PID/schedstat, nanoseconds).

    Raises NotCounted where there is no such count, and OSError where no descriptor is left.
    """
    try:
        descriptor = os.open(_WAITED, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotCounted from None
    try:
        ran, waited, _ = os.read(descriptor, _MOST_BYTES).split()
    finally:
        os.close(descriptor)
    if not int(ran):
        raise NotCounted
    return int(waited) / 1e9


def of_this_thread() -> Courtesy | None:
    """That of the thread that asks. None, and a low priority instead, where there is no telling how long it waits."""
    try:
        return Courtesy(waited_for_a_core_s, threading.Event().wait)
    except (NotCounted, OSError):
        with suppress(OSError):  # Linux has a priority a thread, and nowhere else is this one's id known
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        return None
