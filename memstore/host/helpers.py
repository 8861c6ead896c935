"""Threads beside the one that asks, each of which helps with what it is told of, as long as there is any of it."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Any
from weakref import finalize

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Call = tuple[Callable[..., object], tuple[Any, ...]]

BELL = np.ones(1, np.int64).tobytes()
NONE = np.empty(0, np.int64)


class Helpers:
    """They are begun when they are first needed, and end with this. Nobody waits for them: see scan.py."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._helpers: list[_Helper] = []
        self._bells = np.empty(0, np.int64)

    def tell(self, num_helpers: int, function: Callable[..., object], *arguments: Any) -> NDArray[np.int64]:
        """Has some helpers call a function that does not raise, once each of the bells that this gives is rung.

        Bells, file descriptors, are rung by compiled code: who rings in Python holds the lock that the helper needs.
        """
        if not num_helpers:
            return NONE
        if self._process != os.getpid():  # threads do not live on in a forked process; their bells are the parent's
            self._process, self._helpers = os.getpid(), []
        if len(self._helpers) < num_helpers:
            self._begin(num_helpers - len(self._helpers))
        for helper in self._helpers[:num_helpers]:
            helper.calls.append((function, arguments))
        return self._bells[:num_helpers]

    def _begin(self, num_helpers: int) -> None:
        for _ in range(num_helpers):
            helper = _Helper()
            finalize(self, helper.end)
            self._helpers.append(helper)
        self._bells = np.array([helper.bell for helper in self._helpers])


class _Helper:
    """One thread, which waits for its bell."""

    def __init__(self) -> None:
        self.calls: deque[Call | None] = deque()
        self._wait, self.bell = _bell()
        threading.Thread(target=self._help, name="memstore-search", daemon=True).start()

    def end(self) -> None:
        """The thread ends after what it was told of before."""
        self.calls.append(None)
        os.write(self.bell, BELL)

    def _help(self) -> None:
        told = 0
        while True:
            told += _rung(self._wait)
            while told:
                told -= 1
                call = self.calls.popleft()
                if call is None:
                    return self._close()
                function, arguments = call
                function(*arguments)
                del call, function, arguments  # nothing is kept alive while there is nothing to do

    def _close(self) -> None:
        for descriptor in {self._wait, self.bell}:
            os.close(descriptor)


def _bell() -> tuple[int, int]:
    """Where to wait, and what to ring."""
    if hasattr(os, "eventfd"):
        descriptor = os.eventfd(0, os.EFD_CLOEXEC)
        return descriptor, descriptor
    return os.pipe()


def _rung(descriptor: int) -> int:
    """Waits until a bell is rung; how often it was, an eventfd counts and a pipe keeps."""
    return int(np.frombuffer(os.read(descriptor, len(BELL)), np.int64)[0])
