"""Heap: what the C library of this process keeps of memory that was given back to it, and when it gives that up."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from memstore.logs import event

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memstore.seams import Clock

_log = logging.getLogger(__name__)
_LIBRARY = ctypes.CDLL(None)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8

MAX_ARENAS = 2
"""Each arena keeps the most that its threads have had at once; by default there are eight of a core."""
CHECK_S = 1.0
"""How often the process is looked at."""
RISE_BYTES = 32 << 20
"""What may be kept for good; messages of this size never cost page faults."""
QUIET_RATIO = 0.1
"""Cores that a process uses of which nobody wants anything in particular."""
BUSY_S = 60.0
"""How often a busy process gives up what it keeps, which holds its threads up for tens of milliseconds."""


def tune() -> bool:
    """Has glibc keep what was freed, in few arenas: mapping each large message anew costs more than copying it.

    False, and nothing is changed, where the C library is another one. Best before there are threads.
    """
    mallopt = getattr(_LIBRARY, "mallopt", None)
    if mallopt is None:
        return False
    large = 1 << 30, (1 << 31) - 1
    settings = (_ARENA_MAX, MAX_ARENAS), (_MMAP_THRESHOLD, large[0]), (_TRIM_THRESHOLD, large[1]), (_TOP_PAD, 64 << 20)
    return all(mallopt(name, value) for name, value in settings)


class Usage(Protocol):
    """What a process takes of its machine."""

    def resident_bytes(self) -> int:
        """Memory of its own that it has in use, or keeps."""

    def cpu_s(self) -> float:
        """Seconds of all its threads."""

    def trim(self) -> None:
        """Gives up every page that nothing lies in."""


class OwnUsage:
    """That of this process, on Linux with glibc."""

    def resident_bytes(self) -> int:
        """All that is resident but files and shared memory."""
        _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        """Seconds of all threads."""
        return time.process_time()

    def trim(self) -> None:
        """Takes a millisecond for each 10 MB or so; meanwhile no thread gets memory from the arena at hand."""
        _LIBRARY.malloc_trim(0)


class Trimmer:
    """Says when a process gives up what it keeps: once it is quiet, or has been busy for long. Used by one thread."""

    def __init__(self, usage: Usage, clock: Clock) -> None:
        self._usage = usage
        self._clock = clock
        self._floor_bytes = usage.resident_bytes()
        """What was needed when it was last found out."""
        self._trimmed = self._looked = clock.monotonic()
        self._cpu_s = usage.cpu_s()

    def look(self) -> bool:
        """Looks once, and gives up what is kept if it is time; True if so."""
        try:
            return self._look()
        except OSError:  # no descriptor is left to read the numbers with; the next look comes soon
            return False

    def _look(self) -> bool:
        before, now = self._looked, self._clock.monotonic()
        cpu_before_s, self._cpu_s = self._cpu_s, self._usage.cpu_s()
        self._looked = now
        self._floor_bytes = min(self._floor_bytes, resident := self._usage.resident_bytes())
        is_quiet = self._cpu_s - cpu_before_s <= QUIET_RATIO * (now - before)
        if resident < self._floor_bytes + RISE_BYTES or not (is_quiet or now - self._trimmed >= BUSY_S):
            return False
        self._usage.trim()
        self._floor_bytes, self._trimmed = self._usage.resident_bytes(), now
        event(_log, logging.DEBUG, "memory given up", before_bytes=resident, after_bytes=self._floor_bytes)
        return True


@contextmanager
def kept_small(clock: Clock) -> Iterator[None]:
    """A thread that looks after the heap of this process, for the length of the block; none where it is not glibc's."""
    if not hasattr(_LIBRARY, "malloc_trim"):
        yield
        return
    trimmer, stopping = Trimmer(OwnUsage(), clock), threading.Event()

    def run() -> None:
        while not stopping.wait(CHECK_S):
            trimmer.look()

    thread = threading.Thread(target=run, name="memstore-heap", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
