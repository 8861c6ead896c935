"""Store: the data folder of a server, and the archives of the durable memories in it."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Protocol

from memstore.archive import Archive
from memstore.errors import Corrupt, InvalidRequest, NotReady, QuotaExceeded
from memstore.folder import (
    SPILLED,
    MemoryFolder,
    leftovers,
    number_behind,
    path_of,
    retire_spilled,
    retired_path,
    spilled_path,
)
from memstore.journal import Syncer
from memstore.logs import event
from memstore.orphans import missed_by_nobody
from memstore.slab import bytes_needed
from memstore.spill_file import SpillFolder
from memstore.types import Durability

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from memstore.catalog import MemoryId
    from memstore.journal import Asked
    from memstore.memory import Memory
    from memstore.seams import Clock, Disk
    from memstore.types import MemorySpec

LEAST_LOG_BYTES = 64 << 20
"""A log shorter than this is no reason for a snapshot."""
REPLIES_BYTES = 1 << 20
"""What a file of a spilled sequence may have beside its rows: 256 replies to each of 64 writers."""
PROGRESS_S = 2.0
"""How often the log says how far a memory is loaded."""
_log = logging.getLogger(__name__)


class StoreObserver(Protocol):
    """Who is told what happens to files; must be quick."""

    def recovered(self, cut_bytes: int, seconds: float) -> None:
        """A memory was read back; so many bytes of its log were a torn end."""

    def snapshot(self, outcome: str, seconds: float) -> None:
        """A snapshot was taken ("ok"), or was not ("failed")."""


class Store(Protocol):
    """Where durable memories are kept."""

    def check(self, spec: MemorySpec) -> None:
        """Raises InvalidRequest where a memory of this spec cannot be kept here at all, QuotaExceeded for its size."""

    def create(self, memory: MemoryId, identity: str, engine: Memory) -> Archive | None:
        """Begins the files of a new memory and makes them its keeper; None for a volatile one.

        Raises NotReady, and QuotaExceeded where others have taken its room since `check`.
        """

    def recover(self, memory: MemoryId, identity: str, engine: Memory) -> Archive | None:
        """Fills a memory with what its files hold, as `create`. Raises Corrupt, NotReady."""

    def let_go(self, archive: Archive, spec: MemorySpec) -> None:
        """Closes what `recover` gave, of a memory that comes to nothing for now; its files stay as they are."""

    def mark_passing(self, memory: MemoryId) -> None:
        """Before the catalogue forgets a memory that is dropped: so that a start can tell what is left of it."""

    def forget_passing(self, memory: MemoryId) -> None:
        """The catalogue could not forget it, and it stays."""

    def retire(self, memory: MemoryId, archive: Archive | None, spec: MemorySpec | None) -> Callable[[], None]:
        """Ends the files of a memory that was dropped, after a snapshot that is under way; its name is free then.

        archive, spec: what it was; both None where it could not be loaded. Gives what removes them, which may take
        long, and then gives its share of the quota back; that raises NotReady. In any thread. Raises NotReady.
        """

    def retire_orphans(self, known: Iterable[MemoryId]) -> None:
        """Puts out of the way, for `remove_rest`, what a process that was killed has left of memories that were being
        dropped or made. known: those of the catalogue. Before any other is made. Raises NotReady.
        """

    def remove_rest(self) -> None:
        """Removes what an earlier server has spilled, or had still to remove. In any thread. Raises NotReady."""

    def spill_folder(self, memory: MemoryId) -> SpillFolder | None:
        """Where a memory has files of its sequences that are spilled; None where it has none."""

    def stop(self) -> None:
        """From now on `recover` raises NotReady, wherever it is."""

    def close(self, patience_s: float | None = None) -> None:
        """Ends the threads; archives are closed before.

        patience_s: how long to wait for the removal of what was spilled; as long as it takes if None.
        """


class NoStore:
    """Keeps no rows: only volatile memories can be here, which spill to host memory at most."""

    def check(self, spec: MemorySpec) -> None:
        if spec.durability is not Durability.VOLATILE:
            raise InvalidRequest("spec.durability", f"{spec.durability.value}: this server keeps no rows")
        if spec.spill.host_sequences < spec.spill.max_sequences:
            field = "spec.spill.host_sequences"
            raise InvalidRequest(
                field, f"below {spec.spill.max_sequences}, and this server keeps no files for the rest"
            )

    def create(self, memory: MemoryId, identity: str, engine: Memory) -> Archive | None:
        return None

    def recover(self, memory: MemoryId, identity: str, engine: Memory) -> Archive | None:
        self.check(engine.spec)
        return None

    def let_go(self, archive: Archive, spec: MemorySpec) -> None:
        """There are no archives."""

    def mark_passing(self, memory: MemoryId) -> None:
        """It has no files."""

    def forget_passing(self, memory: MemoryId) -> None:
        """It has no files."""

    def retire(self, memory: MemoryId, archive: Archive | None, spec: MemorySpec | None) -> Callable[[], None]:
        return _nothing

    def retire_orphans(self, known: Iterable[MemoryId]) -> None:
        """There are none."""

    def remove_rest(self) -> None:
        """There is nothing."""

    def spill_folder(self, memory: MemoryId) -> SpillFolder | None:
        return None

    def stop(self) -> None:
        """Nothing is read."""

    def close(self, patience_s: float | None = None) -> None:
        """There are no threads."""


class FileStore:
    """Archives in a folder that this server owns. Thread safe, one call of a memory at a time."""

    def __init__(
        self, data: Path, disk: Disk, clock: Clock, quota_bytes: int, observer: StoreObserver, syncers: Syncers
    ) -> None:
        """quota_bytes: what memories may take in the folder; 0 for no bound but the disk's.

        What an earlier server has spilled is put out of the way, for `remove_rest`: nothing of it is needed. Raises
        OSError.
        """
        self._data = data
        self._disk = disk
        self._clock = clock
        self._quota_bytes = quota_bytes
        self._observer = observer
        self._syncers = syncers
        self.used_bytes = 0
        self._lock = threading.Lock()
        self._is_stopping = threading.Event()
        retire_spilled(data, disk)
        self._rest = leftovers(data, disk)
        self._numbers = count(number_behind(self._rest))

    def check(self, spec: MemorySpec) -> None:
        needed = disk_bytes(spec)
        left = self._quota_bytes - self.used_bytes
        if self._quota_bytes and needed > max(left, 0):
            raise QuotaExceeded(
                f"the memory may take {needed} bytes of disk, which the data folder's quota has not left",
                needed_bytes=needed,
            )

    def create(self, memory: MemoryId, identity: str, engine: Memory) -> Archive | None:
        self.check(engine.spec)
        if engine.spec.durability is Durability.VOLATILE:
            self._count(engine.spec)
            return None
        folder, syncer = self._folder(memory), self._syncers.of(engine.spec)
        try:
            archive = Archive.create(folder, identity, engine.spec, syncer)
        except OSError as error:
            raise _unwritable(error) from error
        engine.keeper = archive.journal
        self._count(engine.spec)
        return archive

    def recover(self, memory: MemoryId, identity: str, engine: Memory) -> Archive | None:
        if engine.spec.durability is Durability.VOLATILE:
            self._count(engine.spec)
            return None
        begun = self._clock.monotonic()
        progress = Progress(memory.name, self._clock, self._is_stopping)
        folder, syncer = self._folder(memory), self._syncers.of(engine.spec)
        try:
            archive, found = Archive.recover(folder, identity, engine, syncer, progress)
        except OSError as error:
            raise _unwritable(error) from error
        self._count(engine.spec)
        seconds = self._clock.monotonic() - begun
        self._observer.recovered(found.cut_bytes, seconds)
        if found.cut_bytes:
            event(_log, logging.WARNING, "torn end of the log is cut", memory=memory.name, cut_bytes=found.cut_bytes)
        if found.is_loss_possible and archive.journal.may_lose:
            event(_log, logging.WARNING, "the machine went down: the last second may be lost", memory=memory.name)
        rows = engine.counts().num_rows
        event(_log, logging.INFO, "memory restored", memory=memory.name, rows=rows, seconds=round(seconds, 3))
        return archive

    def let_go(self, archive: Archive, spec: MemorySpec) -> None:
        self._count(spec, -1)
        with suppress(OSError):  # it is closed all the same, though not marked so
            archive.close()

    def mark_passing(self, memory: MemoryId) -> None:
        folder = self._folder(memory)
        with suppress(OSError):  # a full disk, say: where it is not renamed either, the next start leaves it as it is
            if self._disk.names(folder.path):
                folder.mark_passing()

    def forget_passing(self, memory: MemoryId) -> None:
        with suppress(OSError):  # loading it forgets it too
            self._folder(memory).forget_passing()

    def retire(self, memory: MemoryId, archive: Archive | None, spec: MemorySpec | None) -> Callable[[], None]:
        path = self._folder(memory).path
        rest = retired_path(path, next(self._numbers))
        try:
            if archive is not None:
                archive.end()
            if archive is not None or spec is None:
                with suppress(FileNotFoundError):  # of one that could not be loaded
                    self._disk.rename(path, rest)
        except OSError as error:
            self._count(spec, -1)
            raise _unwritable(error) from error
        return partial(self._remove, rest, spec)

    def retire_orphans(self, known: Iterable[MemoryId]) -> None:
        paths = {self._folder(memory).path for memory in known}
        try:
            for path in missed_by_nobody(self._data, paths, self._disk):
                rest = retired_path(path, next(self._numbers))
                self._disk.rename(path, rest)
                self._rest.append(rest)
                event(_log, logging.WARNING, "what was left of a memory is removed", folder=path)
        except OSError as error:
            raise _unwritable(error) from error

    def remove_rest(self) -> None:
        problem: OSError | None = None
        for folder in self._rest:
            try:
                self._disk.remove_folder(folder)
            except OSError as error:  # the next start tries it again
                problem = error
        if problem is not None:
            raise _unwritable(problem) from problem

    def spill_folder(self, memory: MemoryId) -> SpillFolder | None:
        return SpillFolder(spilled_path(self._data, *memory, next(self._numbers)), self._disk)

    def stop(self) -> None:
        self._is_stopping.set()

    def close(self, patience_s: float | None = None) -> None:
        self._syncers.close()
        removal = threading.Thread(target=self._remove_spilled, name="memstore-removal", daemon=True)
        removal.start()
        removal.join(patience_s)

    def _remove_spilled(self) -> None:
        with suppress(OSError):  # the next start tries it again
            self._disk.remove_folder(self._data / SPILLED)

    def _remove(self, rest: Path, spec: MemorySpec | None) -> None:
        """Removes what was retired."""
        try:
            self._disk.remove_folder(rest)
        except OSError as error:  # the next start tries it again
            raise _unwritable(error) from error
        finally:
            self._count(spec, -1)

    def _count(self, spec: MemorySpec | None, sign: int = 1) -> None:
        """Takes a memory's share of the quota, or gives it back; nothing where it was not loaded, and had none."""
        with self._lock:
            self.used_bytes += 0 if spec is None else sign * disk_bytes(spec)

    def _folder(self, memory: MemoryId) -> MemoryFolder:
        return MemoryFolder(path_of(self._data, memory.tenant, memory.name), self._disk)


class Syncers:
    """The threads that sync: one for memories whose callers wait, one for those whose do not."""

    def __init__(self, always: Asked, interval: Asked) -> None:
        self._always = always
        self._interval = interval

    def of(self, spec: MemorySpec) -> Asked:
        """Who syncs a memory of this spec."""
        return self._always if spec.durability is Durability.ALWAYS else self._interval

    def close(self) -> None:
        """Ends the threads."""
        for syncer in (self._always, self._interval):
            if isinstance(syncer, Syncer):
                syncer.close()


class Progress:
    """Says how far a memory is, every now and then. NotReady once the server is stopping."""

    def __init__(self, name: str, clock: Clock, is_stopping: threading.Event) -> None:
        self._name = name
        self._is_stopping = is_stopping
        self._clock = clock
        self._said = clock.monotonic()

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        if self._is_stopping.is_set():
            raise NotReady("the server is stopping")
        now = self._clock.monotonic()
        if now - self._said >= PROGRESS_S:
            self._said = now
            percent = 100 * done_bytes // max(total_bytes, 1)
            event(_log, logging.INFO, "loading memory", memory=self._name, percent=percent, bytes=total_bytes)


def log_limit(spec: MemorySpec) -> int:
    """What a log may cost at a restart (Journal.replay_bytes) before a snapshot is due: as much as all rows."""
    return max(LEAST_LOG_BYTES, _all_bytes(spec))


def disk_bytes(spec: MemorySpec) -> int:
    """Bytes of disk that a memory may take: two snapshots, the log until the next one is done, and spilled files."""
    if spec.durability is Durability.VOLATILE:
        return spilled_bytes(spec)
    return 2 * _all_bytes(spec) + 2 * log_limit(spec) + spilled_bytes(spec)


def spilled_bytes(spec: MemorySpec) -> int:
    """Bytes that the files of spilled sequences may take: of all that have no room in host memory, and of one more.

    For a durable memory twice all of them: while a snapshot is taken, what it has still to see stays where it is.
    """
    most, on_host = spec.spill.max_sequences, spec.spill.host_sequences
    if not most or (most == on_host and spec.durability is Durability.VOLATILE):
        return 0
    number = most - on_host + 1 if spec.durability is Durability.VOLATILE else 2 * (most + 1)
    return number * (bytes_needed(replace(spec, max_sequences=1)) + REPLIES_BYTES)


def _all_bytes(spec: MemorySpec) -> int:
    """Bytes of the rows of all sequences, wherever they lie."""
    return bytes_needed(replace(spec, max_sequences=spec.total_sequences))


def _nothing() -> None:
    """There is nothing to be removed."""


def _unwritable(error: OSError) -> NotReady | Corrupt:
    if isinstance(error, FileNotFoundError):
        return Corrupt(f"{error.filename}: a file of the memory is missing")
    return NotReady(f"the data folder cannot be used ({error.strerror})")
