"""Removals: what is left to do of memories that were dropped, in a thread for each tenant that has some."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    Work = tuple[Callable[[], None], Future[None]]


class Removals:
    """Runs the work of each tenant in order, and that of different ones beside one another. Thread safe.

    A thread ends when its tenant has no more work, so that there are as many as tenants that are dropping something.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Work]] = {}
        self._changed = threading.Condition()

    def submit(self, tenant: str, run: Callable[[], None]) -> Future[None]:
        """Runs something behind the other work of a tenant; its outcome, which cannot be cancelled."""
        outcome: Future[None] = Future()
        outcome.set_running_or_notify_cancel()
        with self._changed:
            waiting = self._waiting.get(tenant)
            if waiting is not None:
                waiting.append((run, outcome))
                return outcome
            self._waiting[tenant] = deque([(run, outcome)])
        threading.Thread(target=self._run, args=(tenant,), name="memstore-removal", daemon=True).start()
        return outcome

    def close(self) -> None:
        """Returns when all is done; nothing is submitted any more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)

    def _run(self, tenant: str) -> None:
        while work := self._next(tenant):
            run, outcome = work
            try:
                run()
            except Exception as error:  # the root of this thread: whoever waits is told
                outcome.set_exception(error)
            else:
                outcome.set_result(None)

    def _next(self, tenant: str) -> Work | None:
        with self._changed:
            waiting = self._waiting[tenant]
            if waiting:
                return waiting.popleft()
            del self._waiting[tenant]
            self._changed.notify_all()
            return None
