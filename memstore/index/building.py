"""Building: one generation after the other, in one thread beside the device's, which reads rows and hands over parts.

The thread takes what others leave: it rests where they want its core, and FAISS has one core in eight.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from memstore.index.courtesy import of_this_thread
from memstore.index.generation import Generation
from memstore.index.stored_rows import StoredRows
from memstore.logs import trouble

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memstore.index.courtesy import Courtesy
    from memstore.index.generation import PartBuilder
    from memstore.slab import Slab

LONGEST_WAIT_S = 0.05
"""Of a build for retrievals that follow one another without a gap, so that it comes to an end beside them."""

_log = logging.getLogger(__name__)


class Precedence:
    """Retrievals go first: a build waits for the one that is under way before it begins its next piece.

    courtesy: of the build thread, towards others than them.
    """

    def __init__(self) -> None:
        self.courtesy: Courtesy | None = None
        self._is_free = threading.Event()
        self._is_free.set()
        self._num_asking = 0

    def begin(self) -> None:
        """In the build thread, before its first build."""
        self.courtesy = of_this_thread()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """While the device's thread retrieves; one may be a part of another."""
        self._num_asking += 1
        self._is_free.clear()
        try:
            yield
        finally:
            self._num_asking -= 1
            if not self._num_asking:
                self._is_free.set()

    def wait(self) -> None:
        """In the build thread, between two pieces."""
        if self.courtesy is not None:
            self.courtesy.give_way()
        self._is_free.wait(LONGEST_WAIT_S)


class BuildThread(ThreadPoolExecutor):
    """One thread, for all memories of a device. It begins with the first build, and ends when nobody holds it."""

    def __init__(self) -> None:
        self.precedence = Precedence()
        super().__init__(1, thread_name_prefix="memstore-build", initializer=self.precedence.begin)


def build_thread() -> Executor:
    """See BuildThread."""
    return BuildThread()


def precedence_of(executor: Executor) -> Precedence:
    """Of the builds that it runs."""
    return executor.precedence if isinstance(executor, BuildThread) else Precedence()


class BuildStopped(Exception):
    """Nobody wants the generation any more."""


class Build:
    """One generation on its way. Made and asked to stop by the device's thread, run by the build thread.

    Afterwards `generation` is there, unless it was stopped or has failed. What follows one that failed fails too, so
    that generations have no gap.
    """

    def __init__(
        self,
        builder: PartBuilder,
        slab: Slab,
        place: int,
        positions: tuple[int, int],
        after: Build | None,
        precedence: Precedence,
    ) -> None:
        self.first, self.end = positions
        self.is_stopped = self.has_failed = False
        self.generation: Generation | None = None
        self.seconds = 0.0
        self._builder = builder
        self._after = after
        self._precedence = precedence
        self._rows = [
            StoredRows(slab, layer, place, self.first, self.end, self._check) for layer in range(slab.num_layers)
        ]
        self._written = torch.cuda.current_stream(slab.device).record_event() if slab.device.type == "cuda" else None

    def run(self) -> None:
        """Builds; raises nothing. Lets go of the rows."""
        try:
            if self._after is not None and self._after.has_failed:
                self.has_failed = True
            else:
                self._build()
        except BuildStopped:
            pass
        except Exception as error:  # the root of the thread: the rows stay in the tail, and it is tried again
            self.has_failed = True
            trouble(_log, "build failed", error, first=self.first, end=self.end)
        self._rows, self._after = [], None

    def _build(self) -> None:
        if self._written is not None:
            self._written.synchronize()
        parts: list[object] = []
        for rows in self._rows:
            self._check()
            parts.append(self._builder.build(rows, self._check))
        self.generation = Generation(self.first, self.end, tuple(parts))

    def _check(self) -> None:
        self._precedence.wait()
        if self.is_stopped:
            raise BuildStopped
