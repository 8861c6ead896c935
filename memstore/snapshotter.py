"""Snapshotter: the thread that takes snapshots of durable memories, when their logs are long or old."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from memstore.logs import event, trouble
from memstore.store import log_limit

if TYPE_CHECKING:
    from memstore.archive import Archive
    from memstore.registry import Registry
    from memstore.rooms import Loaded
    from memstore.seams import Clock
    from memstore.store import StoreObserver

CHECK_S = 1.0
"""How often logs are looked at."""
MEND_S = 10.0
"""How soon after the last snapshot one may be taken because a spilled file fails, which the snapshot mends."""
_log = logging.getLogger(__name__)


class Snapshotter:
    """Watches the memories of a registry. A snapshot that fails is tried again after the interval."""

    def __init__(self, registry: Registry, clock: Clock, interval_s: float, observer: StoreObserver) -> None:
        """interval_s: how old what only the log has may become."""
        self._registry = registry
        self._clock = clock
        self._interval_s = interval_s
        self._observer = observer
        self._tried: WeakKeyDictionary[Archive, float] = WeakKeyDictionary()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memstore-snapshots", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Takes the last snapshots, of every memory that was changed since its own; those under way are finished."""
        self.close()
        for loaded in self._registry.all():
            if loaded.archive is not None and loaded.archive.journal.num_kept:
                self._take(loaded)

    def close(self) -> None:
        """Takes no more of them."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(min(CHECK_S, self._interval_s)):
            for loaded in self._registry.all():
                if self._stopping.is_set():
                    return
                if self._is_due(loaded):
                    self._take(loaded)

    def _is_due(self, loaded: Loaded) -> bool:
        archive, has_damage = loaded.archive, loaded.engine.lifecycle.seating.has_damage
        if archive is None or not (archive.journal.num_kept or has_damage):
            return False
        age_s = self._clock.monotonic() - self._tried.setdefault(archive, self._clock.monotonic())
        if age_s >= self._interval_s:
            return True
        is_long = archive.journal.replay_bytes >= log_limit(loaded.spec)
        return not archive.has_failed and (is_long or (has_damage and age_s >= MEND_S))

    def _take(self, loaded: Loaded) -> None:
        if loaded.archive is None:
            return
        begun = self._clock.monotonic()
        self._tried[loaded.archive] = begun
        try:
            is_taken = loaded.archive.snapshot(loaded.engine, self._registry.worker.control)
        except Exception as error:  # the root of this thread: a bug fails this snapshot, not all those to come
            self._observer.snapshot("failed", self._clock.monotonic() - begun)
            trouble(_log, "snapshot failed", error, memory=loaded.id.name)
            return
        if is_taken:
            seconds = self._clock.monotonic() - begun
            self._observer.snapshot("ok", seconds)
            event(_log, logging.INFO, "snapshot taken", memory=loaded.id.name, seconds=round(seconds, 3))
