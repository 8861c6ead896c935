"""A durable memory over a fake disk, through one life of its process after another."""

from __future__ import annotations

import itertools
import zlib
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from memstore.archive import Archive
from memstore.errors import MemstoreError
from memstore.folder import MemoryFolder
from memstore.memory import Memory
from memstore.spill_file import SpillFolder
from memstore.still import Still
from memstore.types import Durability, MemorySpec, RetrieveOptions, SequencePart, SequenceResult, StepBatch, StepResult
from tests.fakes import Diligent, FakeDisk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memstore.recovery import Recovered

T = TypeVar("T")
CPU = torch.device("cpu")
FOLDER = Path("/data/memories/t/m")
SPILLED = Path("/data/spilled/t/m")
SPEC = MemorySpec(name="m", dim=2, capacity=4, max_sequences=3, dtype=torch.float16, durability=Durability.ALWAYS)
Picture = dict[str, object]


class Life:
    """One life of a server with one memory, whose files may be those of an earlier life."""

    def __init__(
        self,
        disk: FakeDisk,
        spec: MemorySpec = SPEC,
        *,
        is_new: bool = False,
        syncer: Diligent | None = None,
        epochs: Iterator[int] | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.disk = disk
        self.folder = MemoryFolder(FOLDER, disk)
        self.syncer = syncer or Diligent()
        self.epochs: Iterator[int] = epochs or itertools.count(1)
        self.memory = Memory(spec, device, new_epoch=self.epochs.__next__)
        disk.remove_folder(SPILLED)
        if self.memory.lifecycle.spill is not None:
            self.memory.lifecycle.spill.tiers.files.folder = SpillFolder(SPILLED, disk)
        self.found: Recovered | None = None
        if is_new:
            self.archive = Archive.create(self.folder, "m", spec, self.syncer)
            self.memory.keeper = self.archive.journal
        else:
            self.archive, self.found = Archive.recover(
                self.folder, "m", self.memory, self.syncer, lambda done, total: None
            )

    def again(self) -> Life:
        """The next life, after whatever happened to the disk."""
        memory = self.memory
        return Life(self.disk, memory.spec, syncer=self.syncer, epochs=self.epochs, device=memory.device)

    def blank(self) -> Memory:
        """An empty memory of the same spec."""
        return Memory(self.memory.spec, self.memory.device, new_epoch=self.epochs.__next__)

    def append(
        self,
        name: str = "a",
        rows: int = 1,
        seq: int = 0,
        *,
        writer: str = "w",
        value: float = 0.0,
        start: bool = False,
    ) -> SequenceResult:
        """Appends rows that say who they are; MemstoreError where that is refused."""
        return self.step(batch(self.memory.spec, name, rows, seq, writer=writer, value=value, start=start))

    def step(self, step: StepBatch) -> SequenceResult:
        """What happened to the one sequence of a batch."""
        (result,) = self.memory.step([step])
        if isinstance(result, MemstoreError):
            raise result
        return result.sequences[0]

    def control(self, run: Callable[[], T], /) -> Future[T]:
        """Runs something as the device's thread would, at once."""
        future: Future[T] = Future()
        try:
            future.set_result(run())
        except MemstoreError as error:
            future.set_exception(error)
        return future

    def snapshot(self) -> bool:
        """Takes a snapshot."""
        return self.archive.snapshot(self.memory, self.control)

    def picture(self) -> Picture:
        """Everything there is to see, byte for byte."""
        return picture(self.memory)


class OneMemory:
    """The memories of a Life, for a Snapshotter."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.worker = self
        self.engine, self.archive, self.spec = life.memory, life.archive, life.memory.spec
        self.id = self
        self.name = "m"
        self.control = life.control

    def all(self) -> list[OneMemory]:
        """The one."""
        return [self]


def batch(
    spec: MemorySpec,
    name: str,
    rows: int,
    seq: int,
    *,
    writer: str = "w",
    value: float = 0.0,
    start: bool = False,
    epoch: int = 0,
) -> StepBatch:
    """An append of rows of which each is different."""
    numbers = torch.arange(spec.num_layers * rows * spec.dim).view(spec.num_layers, rows, spec.dim)
    keys = (numbers + 10 * seq + value) / 7
    payloads = {
        each.name: (torch.arange(spec.num_layers * rows * torch.Size(each.shape).numel()) + seq)
        .view(spec.num_layers, rows, *each.shape)
        .to(each.dtype)
        for each in spec.payloads
    }
    return StepBatch(
        parts=(SequencePart(sequence=name, num_rows=rows, seq=seq, start_of_sequence=start, epoch=epoch),),
        layers=tuple(range(spec.num_layers)),
        keys=keys,
        payloads=payloads,
        append=True,
        writer=writer,
        fingerprints=(zlib.crc32(keys.numpy().tobytes()),) if writer else (),
    )


def found(memory: Memory, name: str) -> StepResult:
    """What a search of a sequence gives."""
    spec = memory.spec
    query = replace(
        batch(spec, name, 2, 3, writer=""),
        append=False,
        payloads={},
        retrieve=RetrieveOptions(top_k=3, window_before=1, arrays=("key", *(each.name for each in spec.payloads))),
    )
    (result,) = memory.step([query])
    assert isinstance(result, StepResult)
    return result


def picture(memory: Memory) -> Picture:
    """Everything there is to see of a memory, byte for byte."""
    # one of its own: a snapshot may be under way
    still = Still(memory._slab, memory._table, memory.spec, memory.pictures.tiers)
    rows: dict[str, list[bytes]] = {name: [] for name in still.sequences}
    names = {sequence.place: name for name, sequence in still.sequences.items()}
    for piece in still.pieces:
        rows[names[piece.place]].append(b"".join(bytes(part) for part in still.take(piece)))
    sequences = {name: still.whole(name, sequence) for name, sequence in still.sequences.items()}
    return {"counts": memory.counts(), "sequences": sequences, "rows": rows}


def contents(memory: Memory) -> Picture:
    """The same, wherever it lies."""
    seen = picture(memory)
    sequences = {name: replace(sequence, place=0) for name, sequence in dict(seen["sequences"]).items()}  # type: ignore[call-overload]
    return {**seen, "sequences": sequences, "counts": replace(memory.counts(), spill=None, reserved_bytes=0)}
