"""Service: every call of the wire contract as a future, for any front that has a request and a caller."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from memstore import wire
from memstore.catalog import MemoryId
from memstore.errors import InvalidRequest, MemstoreError, NotAllowed
from memstore.futures import done, then
from memstore.jobs import CallJob, Engine, Settling, StepJob, Ticket
from memstore.plane import tensor_bytes
from memstore.sequence import REPLAY_WINDOW
from memstore.standing import Standing
from memstore.types import MemorySpec
from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from google.protobuf.message import Message

    from memstore.memory import Memory
    from memstore.plane import Plane
    from memstore.registry import Registry
    from memstore.rooms import Loaded
    from memstore.standing import Guests

VERSION = "0.1.0"
"""As pyproject.toml has it; a test compares them."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who calls, how tensors travel, and until when (monotonic seconds) the answer is wanted; None: for ever.

    num_bytes: of the message that the request came in; 0 where nobody has counted them, which means to write it anew.
    """

    tenant: str
    plane: Plane
    deadline: float | None = None
    request_id: str = ""
    num_bytes: int = 0


class Service:
    """The calls of memstore.v1.MemoryService, without a network. Thread safe; nothing blocks."""

    def __init__(self, registry: Registry, started_at: float) -> None:
        """started_at: Unix seconds."""
        self.registry = registry
        self._started_at = started_at
        self._worker = registry.worker
        self._methods: Mapping[str, Callable[..., Future[Message]]] = {
            "CreateMemory": self._create,
            "DescribeMemory": self._describe,
            "ListMemories": self._list,
            "DropMemory": self._drop,
            "Step": self._step,
            "Retrieve": self._step,
            "Append": self._step,
            "Reset": self._reset,
            "Fork": self._fork,
            "Pin": self._pin,
            "ServerInfo": self._server_info,
            "OpenPlane": self._open_plane,
        }

    def call(self, method: str, request: Message, caller: Caller) -> Future[Message]:
        """The answer to `request`. A failure is a MemstoreError in the future; `call` itself never raises one.

        Cancelling the future leaves undone what the device has not begun. Tensors of a failed request are let go of.
        """
        future: Future[Message]
        try:
            future = self._methods[method](request, caller)
        except MemstoreError as error:
            future = Future()
            future.set_exception(error)
        if not caller.plane.has_bytes:
            future.add_done_callback(partial(let_go, caller.plane, request))
        return future

    def _step(self, request: wire.StepLike, caller: Caller) -> Future[Message]:
        loaded = self.registry.find(caller.tenant, request.memory)
        return self._worker.submit(step_job(request, caller, loaded.spec, loaded.engine))

    def _reset(self, request: pb.ResetRequest, caller: Caller) -> Future[Message]:
        engine = self.registry.find(caller.tenant, request.memory).engine
        return self._worker.submit(reset_job(request, caller, engine))

    def _fork(self, request: pb.ForkRequest, caller: Caller) -> Future[Message]:
        source, target, as_of = wire.decode_fork(request)
        engine = self.registry.find(caller.tenant, request.memory).engine
        job: CallJob[Message] = CallJob(
            _ticket(request, caller),
            lambda: wire.encode_fork(engine.fork(source, target, as_of, request.epoch)),
            engine,
        )
        return self._worker.submit(job)

    def _pin(self, request: pb.PinRequest, caller: Caller) -> Future[Message]:
        names = wire.sequence_names(request.sequences, "sequences")
        engine = self.registry.find(caller.tenant, request.memory).engine
        job: CallJob[Message] = CallJob(
            _ticket(request, caller),
            lambda: pb.PinResponse(num_pinned=engine.pin(names, not request.unpin)),
            engine,
        )
        return self._worker.submit(job)

    def _create(self, request: pb.CreateMemoryRequest, caller: Caller) -> Future[Message]:
        if not request.HasField("spec"):
            raise InvalidRequest("spec", "missing")
        spec = wire.decode_spec(request.spec)
        memory = MemoryId(caller.tenant, spec.name)

        def make() -> Future[Message]:
            return then(
                self.registry.create(memory, spec, request.exist_ok),
                lambda outcome: then(
                    self._described(outcome[0]),
                    lambda description: done(pb.CreateMemoryResponse(memory=description, created=outcome[1])),
                ),
            )

        return self._admitted(request, caller, make)

    def _describe(self, request: pb.DescribeMemoryRequest, caller: Caller) -> Future[Message]:
        loaded = self.registry.find(caller.tenant, request.name, "name")
        job = CallJob(_ticket(request, caller), lambda: self._description(loaded), _Shown([loaded.engine]))
        return then(self._worker.submit(job), lambda found: done(pb.DescribeMemoryResponse(memory=found)))

    def _list(self, request: pb.ListMemoriesRequest, caller: Caller) -> Future[Message]:
        def describe(memories: list[Loaded | MemorySpec]) -> Future[Message]:
            shown = _Shown([memory.engine for memory in memories if not isinstance(memory, MemorySpec)])
            every = self._worker.control(
                lambda: [self._description(memory) for memory in memories], shown, behind=caller.tenant
            )
            return then(every, lambda found: done(pb.ListMemoriesResponse(memories=found)))

        return self._admitted(
            request, caller, lambda: then(self.registry.listing(caller.tenant, request.name_prefix), describe)
        )

    def _drop(self, request: pb.DropMemoryRequest, caller: Caller) -> Future[Message]:
        memory = MemoryId(caller.tenant, wire.memory_name(request.name, "name"))
        return then(
            self._admitted(request, caller, lambda: self.registry.drop(memory)),
            lambda _: done(pb.DropMemoryResponse()),
        )

    def _server_info(self, request: pb.ServerInfoRequest, caller: Caller) -> Future[Message]:
        del request
        quota, held = self.registry.quotas.of(caller.tenant), self.registry.held(caller.tenant)
        capacity_bytes = self.registry.budget.capacity_bytes
        return done(
            pb.ServerInfoResponse(
                version=VERSION,
                device=str(self._worker.device),
                planes=[caller.plane.kind],
                max_message_bytes=wire.MAX_MESSAGE_BYTES,
                capacity_bytes=min(capacity_bytes, quota.reserved_bytes or capacity_bytes),
                reserved_bytes=held.reserved_bytes,
                replay_window=REPLAY_WINDOW,
                started_at=wire.encode_time(self._started_at),
            )
        )

    def _open_plane(self, request: pb.OpenPlaneRequest, caller: Caller) -> Future[Message]:
        """A front that has memory to lend answers this call itself."""
        raise NotAllowed("plane: nothing is lent to this caller; it goes on inline")

    def _admitted(self, request: Message, caller: Caller, begin: Callable[[], Future[T]]) -> Future[T]:
        """What `begin` begins, counted as a request in flight until it is answered. Raises Overloaded."""
        admission, num_bytes = self._worker.admission, _ticket(request, caller).num_bytes
        admission.admit(caller.tenant, num_bytes)
        try:
            future = begin()
        except BaseException:
            admission.release(caller.tenant, num_bytes, 0.0)
            raise
        future.add_done_callback(lambda _: admission.release(caller.tenant, num_bytes, 0.0))
        return future

    def _described(self, loaded: Loaded) -> Future[pb.MemoryDescription]:
        return self._worker.control(lambda: self._description(loaded), _Shown([loaded.engine]), behind=loaded.id.tenant)

    def _description(self, memory: Loaded | MemorySpec) -> pb.MemoryDescription:
        """Runs in the device thread."""
        if isinstance(memory, MemorySpec):
            return pb.MemoryDescription(spec=wire.encode_spec(memory))
        counts = memory.engine.counts()
        return wire.encode_description(memory.spec, counts, memory.created_at, str(self._worker.device))


class _Shown:
    """Memories that an answer tells about: it leaves once what it counts is as safe as promised, or never can be."""

    def __init__(self, engines: Sequence[Settling]) -> None:
        self._engines = engines
        self._lock = threading.Lock()
        self._num_left = len(engines) + 1

    def settle(self, answer: Callable[[MemstoreError | None], None]) -> None:
        """What cannot be kept any more is told nevertheless, as to any retrieval."""

        def count(_: MemstoreError | None) -> None:
            with self._lock:
                self._num_left -= 1
                is_last = self._num_left == 0
            if is_last:
                answer(None)

        for engine in self._engines:
            engine.settle(count)
        count(None)


def let_go(plane: Plane, request: Message, answer: Future[Message]) -> None:
    """Lets go of the tensors of a request that has failed; one that was answered has had all of them read."""
    if answer.cancelled() or answer.exception() is not None:
        plane.discard(request)


def step_job(request: wire.StepLike, caller: Caller, spec: MemorySpec, engine: Engine) -> StepJob[Message]:
    """What the device thread has to do for a step of the memory `spec`."""
    return StepJob(
        _ticket(request, caller),
        spec.name,
        engine,
        lambda: wire.decode_batch(request, spec, caller.plane),
        wire.Reply(request, caller.plane, spec.durability),
    )


class Resettable(Engine, Protocol):
    """What a reset needs of a memory."""

    def reset(self, names: Sequence[str], release: bool) -> list[int]:
        """See Memory.reset."""


def reset_job(request: pb.ResetRequest, caller: Caller, engine: Resettable) -> CallJob[Message]:
    """What it has to do for a reset."""
    names = wire.sequence_names(request.sequences, "sequences")
    return CallJob(
        _ticket(request, caller), lambda: pb.ResetResponse(epochs=engine.reset(names, request.release)), engine
    )


def stand_job(
    request: pb.StepRequest, caller: Caller, memory: Memory, guests: Guests, is_held: Callable[[], bool] | None = None
) -> CallJob[Standing | None]:
    """What it has to do so that a step which only retrieves can be run again and again; None where that cannot be.

    is_held: False once the memory is another process's again; None where it never is.
    """

    def stand() -> Standing | None:
        if is_held is not None and not is_held():
            return None
        repeated = memory.repeat(wire.decode_batch(request, memory.spec, caller.plane))
        return None if repeated is None else Standing(guests, repeated, is_held)

    return CallJob(_ticket(request, caller), stand)


def _ticket(request: Message, caller: Caller) -> Ticket:
    num_bytes = caller.num_bytes or (request.ByteSize() if caller.plane.has_bytes else tensor_bytes(request))
    return Ticket(
        tenant=caller.tenant,
        num_bytes=num_bytes,
        deadline=caller.deadline,
        request_id=caller.request_id,
    )
