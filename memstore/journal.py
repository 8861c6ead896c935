"""Journal: what makes the changes of one memory last. Written before they are done; says when they are safe.

A volatile memory has a Volatile. A durable one has a Journal over the segments of its log:

    written   every record that the kernel has: it outlives this process
    synced    records below it outlive the machine's power

`interval` answers at once and syncs within INTERVAL_S. `always` holds back the answer to every call, a retrieval's too,
until all that the call could see is synced: what was ever shown is never taken back. One sync serves all that wait.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from memstore import changes as codec
from memstore.errors import Corrupt, ReadOnly
from memstore.log import STEP, Head, frame, write_head
from memstore.logs import trouble
from memstore.row_bytes import RowFormat
from memstore.types import Durability

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memstore.changes import Change
    from memstore.seams import AppendFile, Buffer
    from memstore.slab import StagedRows
    from memstore.types import MemorySpec

INTERVAL_S = 0.5
"""How long `interval` waits with a sync, so that with the time of the sync itself it is within one second."""
CHANGE_BYTES = 4096
"""What a change costs at a restart beside its bytes, about 8 us, in bytes at 500 MB/s."""
ALIGNMENT = 64
"""Rows begin at a multiple of this within a record's body."""
_log = logging.getLogger(__name__)


class Keeper(Protocol):
    """What a memory needs of its journal. Called by the device's thread."""

    durability: Durability

    def write(self, changes: Sequence[Change], rows: StagedRows | None) -> None:
        """Keeps changes before they are done, and the rows that they append. ReadOnly: nothing is kept."""

    def settle(self, answer: Callable[[ReadOnly | None], None]) -> None:
        """Calls `answer` once everything written until now is as safe as the memory promises; maybe at once.

        It is given the error where that cannot be: what was written may or may not last. Any thread may call it.
        """


class Volatile:
    """Keeps nothing."""

    durability = Durability.VOLATILE

    def write(self, changes: Sequence[Change], rows: StagedRows | None) -> None:
        """Nothing is kept."""

    def settle(self, answer: Callable[[ReadOnly | None], None]) -> None:
        answer(None)


class Syncer:
    """A thread that syncs the journals that ask, each a while after it asked first."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._asking: dict[int, Journal] = {}
        self._changed = threading.Condition()
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"memstore-sync-{delay_s:g}s", daemon=True)
        self._thread.start()

    def ask(self, journal: Journal) -> None:
        """Syncs a journal soon."""
        with self._changed:
            self._asking[id(journal)] = journal
            self._changed.notify()

    def close(self) -> None:
        """Syncs what has asked, and ends the thread."""
        self._is_closed.set()
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asking or self._is_closed.is_set())
            if not self._asking:
                return
            self._is_closed.wait(self._delay_s)
            with self._changed:
                asking, self._asking = self._asking, {}
            for journal in asking.values():
                try:
                    journal.sync()
                except Exception as error:  # a root: a bug in an answer must not keep others from theirs
                    trouble(_log, "sync failed", error)


class Asked(Protocol):
    """Who is asked to call `sync`; a Syncer, or a test."""

    def ask(self, journal: Journal) -> None:
        """Calls journal.sync() soon."""


class Journal:
    """The log of one durable memory, open at its end. `write` is the device thread's; the rest is any thread's."""

    def __init__(self, file: AppendFile, head: Head, number: int, spec: MemorySpec, syncer: Asked) -> None:
        """Begins a segment with the record `number`, in a file that is empty; all before is synced. Raises OSError."""
        self.durability = spec.durability
        self._format = RowFormat(spec)
        self._file = file
        self._head = head
        self._syncer = syncer
        self._lock = threading.Lock()
        self._syncing = threading.Lock()
        self._writing = threading.Lock()  # the file is not closed while it is held
        self._retired: list[AppendFile] = []
        self._retired_bytes = self._retired_changes = self._changes = 0
        self._waiting: deque[tuple[int, Callable[[ReadOnly | None], None]]] = deque()
        self._failure = ""
        self._has_failed = self._is_refusing = False
        self._is_asked = False
        write_head(file, head, number, number)
        file.sync()
        self._end = file.size
        self._next = self._synced = number + 1

    @property
    def next_number(self) -> int:
        """The number of the next record."""
        return self._next

    @property
    def log_bytes(self) -> int:
        """Bytes written since the segment before the last snapshot."""
        return self._retired_bytes + self._end

    @property
    def replay_bytes(self) -> int:
        """Bytes of a snapshot that take as long to read as this log takes to be done once more."""
        return self.log_bytes + CHANGE_BYTES * self.num_kept

    @property
    def failure(self) -> str:
        """Why nothing can be written any more; empty while it can."""
        return self._failure

    def write(self, changes: Sequence[Change], rows: StagedRows | None) -> None:
        kept = codec.encode(changes)
        padding = -(4 + len(kept)) % ALIGNMENT
        body: list[Buffer] = [len(kept).to_bytes(4, "little") + kept + bytes(padding)]
        body += [] if rows is None else self._format.encode(rows)
        parts = frame(STEP, self._next, self._synced, body)
        with self._writing:
            if self._failure:
                raise ReadOnly(self._failure)
            try:
                self._file.write(parts)
            except OSError as error:
                self._is_refusing = True
                self._take_back(error)
        self._is_refusing = False
        self._end = self._file.size
        with self._lock:
            self._next += 1
            self._changes += len(changes)
            must_ask = self.durability is Durability.INTERVAL and not self._is_asked
            self._is_asked |= must_ask
        if must_ask:
            self._syncer.ask(self)

    def settle(self, answer: Callable[[ReadOnly | None], None]) -> None:
        problem = ""
        if self.durability is Durability.ALWAYS:
            with self._lock:
                is_safe = self._synced >= self._next
                problem = "" if is_safe else self._failure
                must_wait = not (is_safe or problem)
                if must_wait:
                    self._waiting.append((self._next, answer))
            if must_wait:
                self._syncer.ask(self)
                return
        answer(ReadOnly(problem) if problem else None)

    def sync(self) -> None:
        """Makes all that is written safe, and answers those who wait for it. Never raises."""
        with self._syncing:
            with self._lock:
                until, files = self._next, [*self._retired, self._file]
                retired, self._retired = self._retired, []
                self._is_asked = False
            problem = self._failure
            if not problem and until > self._synced:
                problem = _synced(files)
            for file in retired:
                file.close()
            self._answer(until, problem)

    def rotate(self, file: AppendFile) -> int:
        """Goes on in a new segment, an empty file; its number. Called by the device's thread. Raises OSError."""
        number = self._next
        try:
            write_head(file, replace(self._head, is_behind_loss=False), number, self._synced)
        except OSError:
            file.truncate(0)
            raise
        with self._lock:
            self._retired.append(self._file)
            self._retired_bytes += self._end
            self._retired_changes, self._changes = self._retired_changes + self._changes, 0
            self._file, self._end = file, file.size
            self._next += 1
        return number

    @property
    def is_refusing(self) -> bool:
        """Whether the last change could not be kept."""
        return self._is_refusing or self._has_failed

    @property
    def may_lose(self) -> bool:
        """Whether the machine's power can take what was acknowledged."""
        return self.durability is not Durability.ALWAYS

    @property
    def has_failed(self) -> bool:
        """Whether a sync failed, or a write that could not be undone."""
        return self._has_failed

    @property
    def num_kept(self) -> int:
        """Changes that are in no snapshot."""
        return self._retired_changes + self._changes

    def count_replayed(self, num_changes: int, num_bytes: int) -> None:
        """Counts what the segments before this one hold."""
        self._retired_changes += num_changes
        self._retired_bytes += num_bytes

    def forget_retired(self) -> None:
        """A snapshot holds what the earlier segments held."""
        self._retired_bytes = self._retired_changes = 0

    def close(self, why: str) -> None:
        """Syncs, answers those who wait, and gives the file back; nothing is written any more, for this reason."""
        self.sync()
        with self._syncing, self._writing:  # a dropped memory may be appended to at this moment
            self._failure = self._failure or why
            self._file.close()

    def _take_back(self, error: OSError) -> None:
        """Undoes a write that failed, so that the next one can be tried; without that nothing more is written."""
        problem = f"the log cannot be written ({error.strerror}); nothing was changed"
        try:
            self._file.truncate(self._end)
        except OSError:
            self._failure = "the log could not be written, nor put back; nothing is changed until the server restarts"
            self._has_failed = True
        raise ReadOnly(problem) from error

    def _answer(self, until: int, problem: str) -> None:
        with self._lock:
            if problem:
                self._failure = problem
                self._has_failed = True
            else:
                self._synced = max(self._synced, until)
            ready = []
            while self._waiting and (problem or self._waiting[0][0] <= self._synced):
                ready.append(self._waiting.popleft()[1])
        for answer in ready:
            answer(ReadOnly(problem) if problem else None)


def _synced(files: Sequence[AppendFile]) -> str:
    """Syncs files; what went wrong, or nothing. After a failed sync nobody knows what the disk has, so none follows."""
    for file in files:
        try:
            file.sync()
        except OSError as error:
            return f"the log could not be synced ({error.strerror}); whether the last changes are kept is not known"
    return ""


def read_step(body: memoryview) -> tuple[list[Change], memoryview]:
    """The changes of a record that `Journal.write` made, and the bytes of their rows. Raises Corrupt."""
    length = 4 + int.from_bytes(body[:4], "little")
    if length > len(body):
        raise Corrupt("a record of the log is shorter than it says")
    return codec.decode(body[4:length]), body[length + -length % ALIGNMENT :]
