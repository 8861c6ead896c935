"""Removals: memories that were dropped, and what is left to do of them, in a thread for each tenant that has some."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

from memstore.errors import NotReady
from memstore.logs import event

if TYPE_CHECKING:
    from collections.abc import Callable

    from memstore.catalog import MemoryId
    from memstore.rooms import Loaded, Rooms
    from memstore.store import Store

    Work = tuple[Callable[[], None], Future[None]]

_log = logging.getLogger(__name__)


class Removals:
    """Runs the work of each tenant in order, and that of different ones beside one another. Thread safe.

    A thread ends when its tenant has no more work, so that there are as many as tenants that are dropping something.
    Until a memory has given its bytes back, they count as its tenant's, and its name is taken.
    """

    def __init__(self, rooms: Rooms, store: Store) -> None:
        """rooms, store: of the memories that are dropped."""
        self._rooms = rooms
        self._store = store
        self._going: dict[MemoryId, Loaded | None] = {}
        self._waiting: dict[str, deque[Work]] = {}
        self._changed = threading.Condition()
        self._is_closed = False

    def __len__(self) -> int:
        """Memories whose names are taken still."""
        return len(self._going)

    def __contains__(self, memory: MemoryId) -> bool:
        """Whether a name is taken still."""
        return memory in self._going

    def going(self) -> list[Loaded]:
        """Memories whose bytes are not given back yet."""
        return [loaded for loaded in list(self._going.values()) if loaded is not None]

    def begin(self, memory: MemoryId, loaded: Loaded | None) -> Future[None]:
        """Removes a memory that nobody can find any more; None where it could not be loaded, and has files only.

        Done when its files are gone too. Raises NotReady.
        """
        self._going[memory] = loaded
        return self.submit(memory.tenant, lambda: self._remove(memory, loaded))

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

    def close(self, patience_s: float | None = None) -> None:
        """Returns when all is done, or after so many seconds; nothing is submitted any more.

        What has not begun by then is given up, and what is under way is left alone: the next start removes the rest.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, patience_s)
            self._is_closed = True
            num_tenants = len(self._waiting)
            given_up = [outcome for line in self._waiting.values() for _, outcome in line]
            for line in self._waiting.values():
                line.clear()
        if num_tenants:
            event(_log, logging.WARNING, "the next start goes on removing what was dropped", num_tenants=num_tenants)
        for outcome in given_up:
            outcome.set_exception(_stopping())

    def _remove(self, memory: MemoryId, loaded: Loaded | None) -> None:
        self._check_open()
        archive, spec = (None, None) if loaded is None else (loaded.archive, loaded.spec)
        try:
            try:
                remove = self._store.retire(memory, archive, spec)  # it ends a snapshot, which needs the rows
            finally:
                if loaded is not None:
                    self._rooms.give_back(memory, loaded.engine)
                self._going.pop(memory, None)
            self._check_open()
            remove()
        finally:
            if loaded is not None:
                loaded.engine.remove_files()

    def _check_open(self) -> None:
        """NotReady once nobody waits any more, and another server may have the folder soon."""
        if self._is_closed:
            raise _stopping()

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


def _stopping() -> NotReady:
    return NotReady("the server is stopping; the next start removes the files")
