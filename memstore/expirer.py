"""Expirer: the thread that ends sequences that nobody has used for as long as their memory says."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from memstore.errors import NotReady
from memstore.logs import event, trouble

if TYPE_CHECKING:
    from memstore.registry import Loaded, Registry

CHECK_S = 1.0
"""How often memories are looked at."""
_log = logging.getLogger(__name__)


class Expirer:
    """Watches the memories of a registry that have an `idle_ttl_s`. What fails is tried again the next time."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memstore-expiry", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Looks at every memory once, and returns when what is over has ended."""
        for loaded in self._registry.all():
            if loaded.spec.idle_ttl_s and not self._stopping.is_set():
                self._check(loaded)

    def close(self) -> None:
        """Ends nothing more."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(CHECK_S):
            self.check()

    def _check(self, loaded: Loaded) -> None:
        num_expired = 0
        try:
            while some := self._registry.worker.control(loaded.engine.expire, behind=loaded.id.tenant).result():
                num_expired += some
        except NotReady:  # the server is stopping
            return
        except Exception as error:  # the root of this thread: what fails for one memory fails for no other
            trouble(_log, "idle sequences not ended", error, memory=loaded.id.name)
            return
        if num_expired:
            event(_log, logging.INFO, "idle sequences ended", memory=loaded.id.name, num_sequences=num_expired)
