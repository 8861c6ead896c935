"""StandingStep: a retrieval of a decode loop, which its session runs without sending anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model_client.core import Core
    from model_client.transport.base import Standing, StandingTransport

RUNS_COUNTED = 64
"""Runs after which they are counted, at the latest."""


class StandingStep:
    """A step that only retrieves, for one query of each sequence. Its tensors stay where they are. For one thread.

    queries: (1, S, dim), to be filled before each launch: finite, as nobody checks them any more. index:
    (1, S, k, w) int32 into the rows, -1 for none. positions: (U,) int64; rows: name -> (U, ...) in the memory's dtype.
    There is room for U rows; those in use come first.

    A run is `enter`, `launch` or the replay of a CUDA graph into which it was captured, and `leave`. It sees what was
    appended before it. On a GPU all of it is queued on the current stream, the same one in every run.
    """

    def __init__(self, core: Core, transport: StandingTransport, standing: Standing) -> None:
        self.queries, self.index = standing.queries, standing.index
        self.positions, self.rows = standing.positions, standing.arrays
        self.launch = standing.launch
        self.leave = standing.leave
        self._enter = standing.enter
        self._core = core
        self._breaker = core.breaker
        self._transport = transport
        self._num_uncounted = 0

    def enter(self, timeout_s: float) -> bool:
        """Begins a run; False where there can be none, now or any more: then a step says why, or does it.

        timeout_s: how long the engine is waited for where it is at work.
        """
        if self._breaker.is_open or not self._enter(timeout_s):
            return False
        self._num_uncounted += 1
        if self._num_uncounted == RUNS_COUNTED:
            self.count()
        return True

    def count(self) -> None:
        """Adds the runs since the last time to the counters of the client: that takes as long as a good part of one."""
        number, self._num_uncounted = self._num_uncounted, 0
        self._core.stats.add("calls", number)
        if counted := self._transport.counted:
            self._core.stats.add(counted, number)
