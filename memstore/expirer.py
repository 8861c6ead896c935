"""Expirer: the thread that ends sequences that nobody has used for as long as their memory says."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING

from memstore.errors import NotFound, NotReady
from memstore.logs import event, trouble

if TYPE_CHECKING:
    from memstore.catalog import MemoryId
    from memstore.registry import Registry
    from memstore.rooms import Loaded

CHECK_S = 1.0
"""How often memories are looked at."""
_log = logging.getLogger(__name__)


class Expirer:
    """Watches the memories of a registry that have an `idle_ttl_s`. What fails is tried again the next time.

    The device's thread is asked for each memory behind the jobs of its tenant, and for all at once: one whose jobs take
    long holds up no other. Nothing is asked of a memory again before it has answered.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._asked: dict[MemoryId, Future[None]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memstore-expiry", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Asks for every memory that is not asked for already."""
        for loaded in self._registry.all():
            if loaded.spec.idle_ttl_s and not self._stopping.is_set() and loaded.id not in self._asked:
                answered: Future[None] = Future()
                self._asked[loaded.id] = answered
                answered.add_done_callback(partial(self._answered, loaded.id))
                self._ask(loaded, 0, answered)

    def check(self) -> None:
        """Looks at every memory once, and returns when what is over has ended."""
        self.begin()
        wait(list(self._asked.values()))

    def close(self) -> None:
        """Asks for nothing more."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(CHECK_S):
            self.begin()

    def _ask(self, loaded: Loaded, num_expired: int, answered: Future[None]) -> None:
        """Has some of a memory's sequences ended, and then the others. num_expired: that have been already."""

        def go_on(some: Future[int]) -> None:
            error = some.exception()
            if error is None and some.result() and not self._stopping.is_set():
                self._ask(loaded, num_expired + some.result(), answered)
                return
            self._say(loaded, num_expired, error)
            answered.set_result(None)

        try:
            some = self._registry.worker.control(loaded.engine.expire, behind=loaded.id.tenant)
        except NotReady:  # the server is stopping
            answered.set_result(None)
        else:
            some.add_done_callback(go_on)

    def _answered(self, memory: MemoryId, _: Future[None]) -> None:
        self._asked.pop(memory, None)

    def _say(self, loaded: Loaded, num_expired: int, error: BaseException | None) -> None:
        if num_expired:
            event(_log, logging.INFO, "idle sequences ended", memory=loaded.id.name, num_sequences=num_expired)
        if error is not None and not isinstance(error, NotReady | NotFound):  # the server stops; it was dropped
            trouble(_log, "idle sequences not ended", error, memory=loaded.id.name)
