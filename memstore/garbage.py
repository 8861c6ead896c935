"""Garbage: when Python's collector of it may run."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def settle() -> None:
    """Leaves what is there by now out of every later collection of garbage. For a process that begins to serve.

    Most of it are modules, which stay. A full collection would look at each of their objects with Python's lock held:
    250,000, in 0.15 s.
    """
    gc.collect()
    gc.freeze()


class _Collection:
    """It is put off for as long as anybody in this process wants that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_pauses = 0
        self._was_on = False

    @contextmanager
    def put_off(self) -> Iterator[None]:
        with self._lock:
            if not self._num_pauses:
                self._was_on = gc.isenabled()
                gc.disable()
            self._num_pauses += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_pauses -= 1
                if self._was_on and not self._num_pauses:
                    gc.enable()


put_off = _Collection().put_off
"""A context within which no garbage is collected, in whatever thread: as while a CUDA graph is captured.

What lets go of pinned pages waits for the device, which ends a capture, and an event of pinned memory that is given
back would become a part of the graph.
"""
