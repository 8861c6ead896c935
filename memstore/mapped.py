"""Mapped: the engine over a memory that a server of this host has lent, in the process of the lease's holder."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import torch

from memstore import wire
from memstore.admission import Admission, QueueLimits
from memstore.control import ControlBlock
from memstore.device import DeviceWorker
from memstore.embedded import TENANT
from memstore.errors import InvalidRequest, MemstoreError, NotAllowed, NotReady, ReadOnly
from memstore.lender import state_of
from memstore.lent import LentTable
from memstore.memory import Memory
from memstore.region import can_share, map_region
from memstore.seams import SystemClock, new_epoch
from memstore.sequence import Sequence
from memstore.service import Caller, let_go, reset_job, stand_job, step_job
from memstore.slab import Slab, bytes_needed
from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from google.protobuf.message import Message

    from memstore.lender import LentState
    from memstore.plane import MixedPlane
    from memstore.standing import Standing
    from memstore.types import Hits, MemorySpec, StepBatch, StepResult


_STEPS = pb.StepRequest, pb.RetrieveRequest, pb.AppendRequest


class Mapped:
    """The memory and the sequences of one lease. Thread safe; what is called is done in a thread of its own.

    descriptors: of the slab and of the control block, its own until `close`.
    """

    def __init__(self, mapped: pb.MappedMemory, descriptors: SequenceOf[int], plane: MixedPlane) -> None:
        """Maps what the descriptors, of slab and control block, stand for. Raises MemstoreError, OSError.

        plane: how the tensors of the calls travel.
        """
        self._plane = plane
        self._clock = SystemClock()
        self.mapped = mapped
        self.spec = wire.decode_mapped(mapped)
        device = _device_of(mapped)
        slab, block = descriptors
        self._slab = mapped_slab(mapped, self.spec, slab, device)
        self._block = ControlBlock.map(block, mapped.num_sequences)
        states = wire.found_states(self._block)
        self._places = [state.place for state in states]
        self._table = LentTable(
            {state.name: _sequence(state) for state in states}, self.spec.capacity, self._block, self._written
        )
        self._memory = Memory(self.spec, device, new_epoch=new_epoch, mapped=(self._slab, self._table))
        self._worker = DeviceWorker(device, Admission(QueueLimits()), self._clock)
        self._has_left = False

    @property
    def descriptors(self) -> tuple[int, int]:
        """Of the slab and of the control block."""
        region = self._slab.region
        return -1 if region is None else region.descriptor, self._block.region.descriptor

    @property
    def is_held(self) -> bool:
        """True until the server has ended the lease; also when the server is dead."""
        return self._block.is_held

    def call(self, method: str, request: Message, timeout_s: float) -> Future[Message]:
        """The answer to a Step, Retrieve, Append or Reset of sequences of the lease; see Embedded.call."""
        caller = Caller(tenant=TENANT, plane=self._plane, deadline=self._clock.monotonic() + timeout_s)
        try:
            future = self._begin(request, caller)
        except MemstoreError as error:
            future = Future()
            future.set_exception(error)
        future.add_done_callback(partial(let_go, self._plane, request))
        return future

    def stand(self, request: pb.StepRequest, timeout_s: float) -> Future[Standing | None]:
        """See Embedded.stand."""
        caller = Caller(tenant=TENANT, plane=self._plane, deadline=self._clock.monotonic() + timeout_s)
        job = stand_job(request, caller, self._memory, self._worker.guests, lambda: self.is_held and not self._has_left)
        future: Future[Standing | None]
        try:
            future = self._worker.submit(job)
        except MemstoreError as error:
            future = Future()
            future.set_exception(error)
        future.add_done_callback(lambda _: self._plane.discard(request))
        return future

    def step(
        self, batches: SequenceOf[StepBatch], carry: Callable[[int, Hits], None]
    ) -> list[StepResult | MemstoreError]:
        """See Memory.step. NotReady once the lease has ended."""
        self._check_held()
        return self._memory.step(batches, carry)

    def reset(self, names: SequenceOf[str], release: bool) -> list[int]:
        """See Memory.reset. NotReady once the lease has ended."""
        self._check_held()
        return self._memory.reset(names, release)

    def settle(self, answer: Callable[[ReadOnly | None], None]) -> None:
        """See Memory.settle."""
        self._memory.settle(answer)

    def prepare(self) -> None:
        """Takes the faults of first touches upon itself."""
        self._slab.populate(self._places)

    def leave(self) -> Future[None]:
        """Writes the last state of every sequence into the control block; nothing may be called afterwards."""
        return self._worker.control(self._leave, behind=TENANT)

    def close(self) -> None:
        """Answers what is queued and gives up the mappings."""
        self._worker.close()
        self._memory.free()
        self._block.close()

    def _begin(self, request: Message, caller: Caller) -> Future[Message]:
        if isinstance(request, pb.ResetRequest):
            return self._worker.submit(reset_job(request, caller, self))
        if isinstance(request, _STEPS):
            return self._worker.submit(step_job(request, caller, self.spec, self))
        raise InvalidRequest("request", f"{type(request).__name__} is the server's")

    def _check_held(self) -> None:
        if not self._block.is_held:
            raise NotReady("the lease has ended")

    def _written(self) -> None:
        """Publishes at once where the device has written at once, else when it has. Runs in the device thread."""
        if self._slab.is_on_host:
            self._table.settle()
            return
        try:
            self._worker.control(self._settle, behind=TENANT)
        except NotReady:  # it is being closed, and takes no more
            self._settle()

    def _settle(self) -> None:
        if not self._slab.is_on_host:
            torch.cuda.current_stream(self._slab.device).synchronize()
        self._table.settle()

    def _leave(self) -> None:
        self._has_left = True  # whoever has a Standing enters no more: others may write, or know of more rows
        self._settle()
        states = (state_of(name, sequence, sequence.writers) for name, sequence in self._table.lent())
        wire.leave_states(self._block, states)


def mapped_slab(mapped: pb.MappedMemory, spec: MemorySpec, descriptor: int, device: torch.device) -> Slab:
    """The slab of a mapped memory. Raises OSError, InvalidRequest."""
    expected = bytes_needed(spec, device, is_shared=True)
    if mapped.slab_bytes != expected:
        raise InvalidRequest("slab_bytes", f"{mapped.slab_bytes}, {expected} expected")
    return Slab(spec, device, region=map_region(descriptor, expected, device))


def _device_of(mapped: pb.MappedMemory) -> torch.device:
    """The device of a mapped memory as this process counts its devices. Raises NotAllowed."""
    if mapped.plane == pb.PLANE_SHM:
        return torch.device("cpu")
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        if device_name(device) == mapped.device and can_share(device):
            return device
    raise NotAllowed(f"device: this process cannot use {mapped.device!a}")


def device_name(device: torch.device) -> str:
    """The name of a device for all processes; empty for the host."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _sequence(state: LentState) -> Sequence:
    return Sequence(state.place, state.epoch, state.next_position, state.floor, state.writers)
