"""Archive: the lasting side of one durable memory: its folder, its journal, and its snapshots."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from memstore.errors import Corrupt, MemstoreError, NotReady, ReadOnly
from memstore.folder import FIRST_SEGMENT
from memstore.journal import Journal
from memstore.log import Head
from memstore.logs import event, trouble
from memstore.recovery import Recovery
from memstore.salvage import Salvage
from memstore.snapshot import Snapshot, State, write
from memstore.tiers import scratch_slab

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from memstore.folder import MemoryFolder
    from memstore.journal import Asked
    from memstore.memory import Memory
    from memstore.recovery import Recovered
    from memstore.seams import AppendFile
    from memstore.still import Piece, Still
    from memstore.types import MemorySpec

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Control(Protocol):
    """Runs something in the device's thread."""

    def __call__(self, run: Callable[[], T], /) -> Future[T]:
        """What `run` gives."""


class _Source:
    """What a snapshot is written from, while the memory goes on."""

    def __init__(self, archive: Archive, spec: MemorySpec, still: Still, control: Control) -> None:
        self._archive = archive
        self._spec = spec
        self._still = still
        self._control = control

    def take(self, piece: Piece) -> list[memoryview]:
        self._archive.check_open()
        if self._still.is_filed(piece):  # files stay as they are meanwhile: the device's thread need not wait for them
            return self._still.take(piece)
        return self._control(lambda: self._still.take(piece)).result()

    def salvage(self, names: list[str]) -> Salvage:
        self._archive.check_open()
        return self._archive.salvage(self._spec, names)


class Archive:
    """A durable memory's files, open. `memory` is filled, and its keeper is the journal."""

    def __init__(self, folder: MemoryFolder, identity: str, segment: int, journal: Journal) -> None:
        self.journal = journal
        self._folder = folder
        self._identity = identity
        self._segment = segment
        self._spare: AppendFile | None = None
        self.has_failed = False
        """Whether the last snapshot could not be taken."""
        self._busy = threading.Lock()
        self._is_closing = threading.Event()

    @classmethod
    def create(cls, folder: MemoryFolder, identity: str, spec: MemorySpec, syncer: Asked) -> Archive:
        """A memory that is new: whatever its folder held is removed. Raises OSError."""
        folder.disk.remove_folder(folder.path)
        return cls._begin(folder, identity, spec, syncer)

    @classmethod
    def recover(
        cls,
        folder: MemoryFolder,
        identity: str,
        memory: Memory,
        syncer: Asked,
        progress: Callable[[int, int], None],
    ) -> tuple[Archive, Recovered]:
        """A memory as its folder has it; `memory` is new, and filled. Raises Corrupt, OSError and NotReady."""
        found = Recovery(folder, identity, progress).run(memory)
        folder.mark_open()  # before the log goes on; its name is gone for good once the new segment's is there
        archive = cls._begin(folder, identity, memory.spec, syncer, found)
        try:
            archive._go_on_with(memory, found)
        except BaseException:
            archive.journal.close("the memory could not be loaded")
            raise
        return archive, found

    def _go_on_with(self, memory: Memory, found: Recovered) -> None:
        """Makes the journal the keeper of what was found, under new epochs where positions may have been lost."""
        self.journal.count_replayed(found.num_changes, found.log_bytes)
        memory.keeper = self.journal
        if found.is_restored or (found.is_loss_possible and self.journal.may_lose):
            try:
                memory.renew()
            except ReadOnly as error:
                raise NotReady(error.message) from error
        self._folder.forget_restored()
        self._folder.forget_passing()

    @classmethod
    def _begin(
        cls, folder: MemoryFolder, identity: str, spec: MemorySpec, syncer: Asked, found: Recovered | None = None
    ) -> Archive:
        """Goes on behind what was found; None for a memory that is new."""
        segment, number, is_behind_loss = FIRST_SEGMENT, 1, False
        if found is not None:
            segment, number, is_behind_loss = found.next_segment, found.next_number, found.is_loss_possible
        head = Head(identity, folder.disk.boot_id(), is_behind_loss)
        file = folder.disk.create(folder.segment(segment))
        try:
            journal = Journal(file, head, number, spec, syncer)
        except BaseException:
            file.close()
            raise
        return cls(folder, identity, segment, journal)

    def snapshot(self, memory: Memory, control: Control) -> bool:
        """Takes a snapshot while the memory goes on, checks it, and only then removes what it replaces.

        Sequences whose spilled files fail are taken from the log that is here still, and spilled anew (salvage.py).
        control: runs something in the device's thread. False where the archive was closed meanwhile. Raises OSError,
        Corrupt where what was written cannot be read back, or a spilled file fails and the log too, NotReady where the
        log cannot go on for now, or the device's thread has ended; what was there before is there still.
        """
        with self._busy:
            if self._is_closing.is_set() or self.journal.failure:
                return False
            self.has_failed = True
            spare = self._spare = self._spare or self._folder.disk.create(self._folder.segment(self._segment + 1))
            try:
                is_taken = self._take(memory, spare, control)
            finally:
                control(memory.pictures.let_go).result()
            self.has_failed = False
            return is_taken

    def close(self) -> None:
        """Ends what is under way, syncs the log and marks it closed. Raises OSError."""
        self._is_closing.set()
        with self._busy:
            self.journal.close("the server is stopping")
            self._drop_spare()
            if not self.journal.has_failed:
                self._folder.mark_closed(self.journal.next_number)

    def end(self) -> None:
        """Ends what is under way, and writes nothing any more; the memory is dropped. Raises OSError."""
        self._is_closing.set()
        with self._busy:
            self.journal.close("the memory is dropped")
            self._drop_spare()

    def _take(self, memory: Memory, spare: AppendFile, control: Control) -> bool:
        still, state = self._hold(memory, spare, control)
        number, disk = self._segment, self._folder.disk
        unfinished = self._folder.partial(number)
        disk.remove_folder(unfinished)
        self.journal.sync()
        if self.journal.failure:  # a snapshot is of no use without the head of the segment behind it
            return False

        try:
            write(disk, unfinished, state, still, _Source(self, memory.spec, still, control))
        except (MemstoreError, OSError):
            disk.remove_folder(unfinished)  # a full disk wants it back
            if self._is_closing.is_set():
                return False
            raise
        disk.rename(unfinished, self._folder.snapshot(number))
        try:
            Snapshot(disk, self._folder.snapshot(number)).verify()
        except (Corrupt, OSError):
            disk.remove_folder(self._folder.snapshot(number))
            raise
        self._mend(memory, still, control)
        self.journal.forget_retired()
        self._folder.remove_before(number)
        return True

    def check_open(self) -> None:
        """NotReady where the memory is dropped or the server stops, and nobody waits for a snapshot any more."""
        if self._is_closing.is_set():
            raise NotReady("the memory is being closed")

    def salvage(self, spec: MemorySpec, names: list[str]) -> Salvage:
        """Sequences as they were when this segment of the log began. Raises Corrupt, OSError."""
        return Salvage(self._folder, spec, self._segment, names)

    def _mend(self, memory: Memory, still: Still, control: Control) -> None:
        """Spills anew what had to be salvaged, while the log that has it is still there."""
        for name, rescue in still.rescued.items():
            try:
                scratch = scratch_slab(memory.spec)
                rescue.fill(name, scratch)
                found = replace(still.sequences[name], writers=rescue.sequence(name).writers)
                control(partial(memory.lifecycle.mend, name, found, scratch)).result()
            except (MemstoreError, OSError) as error:
                trouble(_log, "spilled sequence not mended", error, sequence=ascii(name))
            else:
                event(_log, logging.WARNING, "spilled sequence mended from the log", sequence=ascii(name))

    def _hold(self, memory: Memory, spare: AppendFile, control: Control) -> tuple[Still, State]:
        """Begins a new segment of the log and a picture of the memory in the same moment."""

        def hold() -> tuple[Still, State]:
            try:
                number = self.journal.rotate(spare)
            except OSError as error:
                raise NotReady(f"the log cannot go on in a new segment ({error.strerror})") from error
            still, counts = memory.pictures.hold(), memory.counts()
            memory.lifecycle.seating.has_damage = False
            state = State(
                identity=self._identity,
                number=number,
                appended_rows=counts.appended_rows,
                evicted_rows=counts.evicted_rows,
                sequences=still.sequences,
            )
            return still, state

        held = control(hold).result()
        self._spare = None
        self._segment += 1
        return held

    def _drop_spare(self) -> None:
        if self._spare is not None:
            self._spare.close()
            self._folder.disk.remove(self._folder.segment(self._segment + 1))
            self._spare = None
