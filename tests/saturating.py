"""Tenants who each want more of a device than there is, and how much of its thread's time each has.

Whatever is answered is asked again before the next turn is chosen, so that none is ever without work. What is counted
is the time of turns, by the clock, and not when or how fast anything is answered.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

from memstore.plane import InlinePlane
from memstore.service import Caller
from memstore.wire import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Future

    from google.protobuf.message import Message

    from memstore.service import Service

TURNS = 12
"""Times the longest turn that are gone through at least: nobody is further ahead then than by a sixth of a share."""


class Saturation:
    """Retrieves for each tenant, several times at once, again and again."""

    def __init__(self, service: Service, asked: Mapping[str, tuple[Message, int]]) -> None:
        """asked: by tenant what is retrieved, and how often at the same time."""
        self._service = service
        self._worker = service.registry.worker
        self._asked = asked
        self._times: dict[str, float] = defaultdict(float)
        self._longest = 0.0
        self._least_s = 0.0
        self._num_left = 0
        self._failure: BaseException | None = None
        self._ended = threading.Event()

    def run(self, seconds: float = 0.0) -> dict[str, float]:
        """What each tenant has had of the device, in shares of equal size: 1 where all have the same.

        seconds: of the device's time that are used up at least. Raises what a request has failed with.
        """
        self._least_s = seconds
        turns = self._worker._turns
        end = turns.end

        def noted(now: float, num_served: int) -> None:
            lane, took = turns._turn, now - turns._begun
            for tenant in self._asked:
                if lane is not None and lane is turns._lanes.get(tenant) and not self._is_over:
                    self._times[tenant] += took
                    self._longest = max(self._longest, took)
            end(now, num_served)

        turns.end = noted  # type: ignore[method-assign]
        try:
            self._worker.control(self._begin).result()
            self._ended.wait()
        finally:
            turns.end = end  # type: ignore[method-assign]
        if self._failure is not None:
            raise self._failure
        total = sum(self._times.values())
        return {tenant: len(self._asked) * self._times[tenant] / total for tenant in self._asked}

    @property
    def _is_over(self) -> bool:
        used_s = sum(self._times.values())
        return self._failure is not None or used_s > max(TURNS * self._longest, self._least_s) > 0

    def _begin(self) -> None:
        """Runs in the device's thread, as what follows."""
        for tenant, (_, number) in self._asked.items():
            for _ in range(number):
                self._num_left += 1
                self._ask(tenant)

    def _ask(self, tenant: str) -> None:
        caller = Caller(tenant=tenant, plane=InlinePlane(MAX_MESSAGE_BYTES))
        answer = self._service.call("Retrieve", self._asked[tenant][0], caller)
        answer.add_done_callback(partial(self._answered, tenant))

    def _answered(self, tenant: str, answer: Future[Message]) -> None:
        self._failure = self._failure or answer.exception()
        if not self._is_over:
            self._ask(tenant)
            return
        self._num_left -= 1
        if not self._num_left:
            self._ended.set()
