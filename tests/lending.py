"""Two memories over one slab, one of which holds a lease of the other's sequences; and what is in them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from memstore.control import ControlBlock
from memstore.errors import MemstoreError
from memstore.lender import state_of
from memstore.lent import LentTable
from memstore.memory import Memory
from memstore.region import map_region
from memstore.sequence import Sequence
from memstore.slab import Slab
from memstore.types import KEY, MemorySpec, PayloadSpec, RetrieveOptions, SequencePart, StepBatch, StepResult
from memstore.wire import found_states, leave_states

if TYPE_CHECKING:
    from memstore.lease import Lease


CPU = torch.device("cpu")
CAPACITY = 8
SPEC = MemorySpec(
    name="m",
    dim=2,
    capacity=CAPACITY,
    max_sequences=3,
    num_layers=2,
    dtype=torch.float32,
    payloads=(PayloadSpec(name="twice", dtype=torch.int64, shape=(1,)),),
)
EVERYTHING = RetrieveOptions(top_k=CAPACITY, arrays=(KEY, "twice"))


class Lent:
    """A server's memory, and the one of a process that it lends sequences to."""

    def __init__(self, spec: MemorySpec = SPEC) -> None:
        epochs = itertools.count(1).__next__
        self.server = Memory(spec, CPU, new_epoch=epochs, is_shared=True)
        self.recalled: list[int] = []
        self.num_ended = 0
        self._epochs = epochs

    def lend(self, *names: str, writer: str = "w") -> Lease:
        """A lease, whose holder has mapped everything."""
        lease = self.server.lender.lend(names, writer, self.recalled.append, self._ended)
        leave_states(lease.block, self.server.lender.states(lease))
        assert self.server.region is not None
        size = self.server.reserved_bytes
        slab = Slab(SPEC, CPU, region=map_region(self.server.region.descriptor, size, CPU))
        self.block = ControlBlock.map(lease.block.region.descriptor, len(names))
        sequences = {
            state.name: Sequence(state.place, state.epoch, state.next_position, state.floor, state.writers)
            for state in found_states(self.block)
        }
        self.table = LentTable(sequences, CAPACITY, self.block, lambda: self.table.settle())
        self.holder = Memory(SPEC, CPU, new_epoch=self._epochs, mapped=(slab, self.table))
        return lease

    def give_back(self, lease: Lease) -> None:
        """As the holder and the server do it."""
        leave_states(self.block, [state_of(name, each, each.writers) for name, each in self.table.lent()])
        self.server.lender.take_back(lease, found_states(lease.block))

    def _ended(self) -> None:
        self.num_ended += 1


def batch(name: str, numbers: list[int], *, seq: int = 0, writer: str = "w", start: bool = False) -> StepBatch:
    """An append of rows of which each has one number in all elements; the payload is twice that."""
    keys = torch.tensor(numbers, dtype=torch.float32).reshape(1, -1, 1).expand(2, -1, 2).contiguous()
    return StepBatch(
        parts=(SequencePart(sequence=name, num_rows=len(numbers), seq=seq, start_of_sequence=start),),
        layers=(0, 1),
        keys=keys,
        payloads={"twice": (keys[..., :1] * 2).long()},
        append=True,
        writer=writer,
        fingerprints=(sum(numbers) + 1,),
    )


def append(memory: Memory, name: str, numbers: list[int], **options: object) -> StepResult:
    """The result of such an append; raises what it was refused with."""
    (result,) = memory.step([batch(name, numbers, **options)])  # type: ignore[arg-type]
    if isinstance(result, MemstoreError):
        raise result
    return result


def content(memory: Memory, name: str, as_of: int | None = None) -> dict[int, int]:
    """Position -> number, which every layer and the payload agree about."""
    part = SequencePart(sequence=name, num_rows=1, as_of=as_of)
    look = StepBatch(parts=(part,), layers=(0, 1), keys=torch.zeros(2, 1, 2), retrieve=EVERYTHING)
    (result,) = memory.step([look])
    if isinstance(result, MemstoreError):
        raise result
    hits = result.hits
    assert hits is not None
    positions = hits.positions.reshape(2, -1)
    numbers = hits.arrays[KEY].reshape(2, -1, 2)
    assert torch.equal(positions[0], positions[1])
    assert torch.equal(numbers[0], numbers[1])
    assert torch.equal(hits.arrays["twice"].reshape(2, -1), (numbers[..., 0] * 2).long())
    return dict(zip(positions[0].tolist(), numbers[0, :, 0].int().tolist(), strict=True))


def counts(memory: Memory) -> tuple[int, int, int, int]:
    """Sequences, rows, rows appended and rows evicted."""
    found = memory.counts()
    return found.num_sequences, found.num_rows, found.appended_rows, found.evicted_rows
