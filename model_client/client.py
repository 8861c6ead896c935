"""MemoryClient: the door to a memstore, in this process or over the network."""

from __future__ import annotations

import atexit
import threading
import weakref
from typing import TYPE_CHECKING, Unpack

from memstore.v1 import memstore_pb2 as pb
from model_client import malloc
from model_client.breaker import Breaker
from model_client.core import Core, M, Running, drive
from model_client.seams import Clock
from model_client.session import Session
from model_client.stats import ClientStats
from model_client.transport import TransportOptions, mapped_transport, may_map, open_transport
from model_client.wire import MemoryOptions, check_options, memory_spec

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from google.protobuf.message import Message

    from model_client.transport.base import Transport
    from model_client.transport.mapped import MappedTransport

ROW_CACHE_BYTES = 64 << 20


class ClientOptions(TransportOptions, total=False):
    """What a client may be given besides its target."""

    timeout_s: float
    """Deadline of each call that is given none, in seconds; 5 if not given."""
    breaker_failures: int
    """Failures in a row after which calls fail at once (CircuitOpen); 5 if not given."""
    breaker_s: float
    """How long they do, in seconds, before one is tried again; 5 if not given."""
    tune_malloc: bool
    """True: large messages take fewer page faults, and this process keeps its largest size; see malloc.tune."""
    row_cache_bytes: int
    """Rows that each session keeps on the host, so that they need not travel again; 64 MiB if not given, 0 for none."""
    transport: Transport
    """A ready one to use instead of opening `target`; closed with the client."""
    clock: Clock
    """The door to time; the real one if not given."""


class ClientBase:
    """What MemoryClient and AsyncMemoryClient have in common: everything up to the waiting."""

    def __init__(self, target: str = ":memory:", **options: Unpack[ClientOptions]) -> None:
        """A client of the memstore at `target`: ":memory:" (in this process), "host:port" or "unix:///path"."""
        check_options(options, ClientOptions)
        if options.get("tune_malloc"):
            malloc.tune()
        self.stats = ClientStats()
        self._timeout_s = options.get("timeout_s", 5.0)
        self._row_cache_bytes = options.get("row_cache_bytes", ROW_CACHE_BYTES)
        self._transport = options.get("transport") or open_transport(target, options, self.stats)
        clock = options.get("clock") or Clock()
        breaker = Breaker(options.get("breaker_failures", 5), options.get("breaker_s", 5.0), clock)
        self._core = Core(self._transport, breaker, self.stats, clock)
        self._plane = options.get("plane", "auto") if may_map(target, options) else "inline"
        self._mapped: weakref.WeakSet[MappedTransport] = weakref.WeakSet()
        _close_with(self._core, self._transport)

    @property
    def transport(self) -> str:
        """How requests travel: "process", "grpc" or "grpc-stream"; "shm" or "cuda" once steps stay in this process."""
        planes = {mapped.plane.name for mapped in self._mapped} - {self._transport.plane.name}
        return planes.pop() if planes else self._transport.name

    def _core_of(self, memory: str, sequences: Sequence[str]) -> Core:
        """What a session works with: a transport of its own where its sequences may come into this process."""
        core = self._core
        if self._plane == "inline":
            return core
        transport = mapped_transport(self._transport, memory, sequences, self._plane, self.stats)
        self._mapped.add(transport)
        own = Core(transport, core.breaker, self.stats, core.clock, owner=core)
        _close_with(own, transport)
        return own

    def _begin(self, method: str, request: Message, reply: type[M], is_repeatable: bool = True) -> Running[M]:
        return Running(self._core.call(method, request, reply, self._timeout_s, is_repeatable))

    def _begin_create(self, name: str, options: MemoryOptions) -> Running[pb.CreateMemoryResponse]:
        exist_ok = options.get("exist_ok", False)
        request = pb.CreateMemoryRequest(spec=memory_spec(name, options), exist_ok=exist_ok)
        return self._begin("CreateMemory", request, pb.CreateMemoryResponse, is_repeatable=exist_ok)

    def _begin_describe(self, name: str) -> Running[pb.DescribeMemoryResponse]:
        return self._begin("DescribeMemory", pb.DescribeMemoryRequest(name=name), pb.DescribeMemoryResponse)

    def _begin_list(self, prefix: str) -> Running[pb.ListMemoriesResponse]:
        return self._begin("ListMemories", pb.ListMemoriesRequest(name_prefix=prefix), pb.ListMemoriesResponse)

    def _begin_drop(self, name: str) -> Running[pb.DropMemoryResponse]:
        return self._begin("DropMemory", pb.DropMemoryRequest(name=name), pb.DropMemoryResponse, is_repeatable=False)

    def _begin_reset(self, memory: str, names: Sequence[str], release: bool) -> Running[pb.ResetResponse]:
        request = pb.ResetRequest(memory=memory, sequences=names, release=release)
        return self._begin("Reset", request, pb.ResetResponse)

    def _begin_fork(
        self, memory: str, source: str, target: str, as_of: int | None, epoch: int
    ) -> Running[pb.ForkResponse]:
        request = pb.ForkRequest(memory=memory, source=source, target=target, as_of=as_of, epoch=epoch)
        return self._begin("Fork", request, pb.ForkResponse, is_repeatable=False)

    def _begin_pin(self, memory: str, names: Sequence[str], unpin: bool) -> Running[pb.PinResponse]:
        return self._begin("Pin", pb.PinRequest(memory=memory, sequences=names, unpin=unpin), pb.PinResponse)

    def _begin_info(self) -> Running[pb.ServerInfoResponse]:
        return self._begin("ServerInfo", pb.ServerInfoRequest(), pb.ServerInfoResponse)

    def _close(self) -> None:
        for mapped in tuple(self._mapped):
            atexit.unregister(mapped.close)
            mapped.close()
        atexit.unregister(self._transport.close)
        self._transport.close()


class MemoryClient(ClientBase):
    """A blocking client, safe from any thread (each of its sessions from one at a time). Close it, or use `with`.

    Every call raises a MemstoreClientError where it fails.
    """

    def info(self) -> pb.ServerInfoResponse:
        """What the server is, can do and allows."""
        return drive(self._begin_info(), self._core.clock)

    def create_memory(self, name: str, **options: Unpack[MemoryOptions]) -> pb.MemoryDescription:
        """A new memory, all of it reserved; with `exist_ok` an existing one of an equal spec."""
        return drive(self._begin_create(name, options), self._core.clock).memory

    def describe_memory(self, name: str) -> pb.MemoryDescription:
        """Spec and counters of one memory."""
        return drive(self._begin_describe(name), self._core.clock).memory

    def list_memories(self, prefix: str = "") -> list[pb.MemoryDescription]:
        """The memories whose names begin with `prefix`, in the order of their names."""
        return list(drive(self._begin_list(prefix), self._core.clock).memories)

    def drop_memory(self, name: str) -> None:
        """Drops a memory with all its rows."""
        drive(self._begin_drop(name), self._core.clock)

    def reset(self, memory: str, names: Sequence[str], release: bool = False) -> list[int]:
        """Empties sequences, or ends them with `release`; their new epochs, 0 for one that does not exist."""
        return list(drive(self._begin_reset(memory, names, release), self._core.clock).epochs)

    def fork(
        self, memory: str, source: str, target: str, *, as_of: int | None = None, epoch: int = 0
    ) -> pb.ForkResponse:
        """Gives the new sequence `target` the live positions of `source` below `as_of`, all if None."""
        return drive(self._begin_fork(memory, source, target, as_of, epoch), self._core.clock)

    def pin(self, memory: str, names: Sequence[str], *, unpin: bool = False) -> int:
        """Keeps sequences on the device, neither spilled nor ended for being idle; how many of the memory are so now.

        unpin: they may leave again.
        """
        return drive(self._begin_pin(memory, names, unpin), self._core.clock).num_pinned

    def session(self, memory: str, sequences: Sequence[str]) -> Session:
        """A new writer of these sequences of a memory. Nothing is sent."""
        core = self._core_of(memory, sequences)
        return Session(core, memory, sequences, self._timeout_s, self._row_cache_bytes)

    def close(self) -> None:
        """Ends every thread and connection; calls under way fail. May be called again."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _close_with(core: Core, transport: Transport) -> None:
    """Closes a transport at the end of the process, and when its core is collected.

    Threads must be gone before the interpreter is: one that wakes up in its ruins takes the process down. Any thread
    may collect, so it is closed on a thread of its own then.
    """
    atexit.register(transport.close)
    weakref.finalize(core, _close_aside, transport).atexit = False


def _close_aside(transport: Transport) -> None:
    atexit.unregister(transport.close)
    threading.Thread(target=transport.close, name="memstore-close").start()
