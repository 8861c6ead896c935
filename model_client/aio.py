"""AsyncMemoryClient: the same client, awaited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from model_client.client import ClientBase
from model_client.core import Core, Running, drive_async
from model_client.session import SessionBase, StepOptions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from torch import Tensor

    from memstore.v1 import memstore_pb2 as pb
    from model_client.wire import MemoryOptions, Retrieval, StepResult


class AsyncPendingStep:
    """A step that has begun; see PendingStep."""

    def __init__(self, core: Core, running: Running[StepResult]) -> None:
        self._core = core
        self._running = running

    def done(self) -> bool:
        """True where `result` would not wait."""
        return self._running.poll()

    async def result(self, timeout_s: float | None = None) -> StepResult:
        """What the step found and did; see PendingStep.result. Cancelling it leaves the step under way."""
        clock = self._core.clock
        begun = clock.monotonic()
        try:
            return await drive_async(self._running, clock, float("inf") if timeout_s is None else begun + timeout_s)
        finally:
            self._core.stats.add("waited_s", clock.monotonic() - begun)


class AsyncSession(SessionBase):
    """The steps of one model over its sequences, awaited, by one task at a time; see Session."""

    def start_step(
        self,
        keys: Tensor,
        counts: Sequence[int],
        *,
        retrieve: Retrieval | None,
        append: bool,
        **options: Unpack[StepOptions],
    ) -> AsyncPendingStep:
        """Begins a step; see Session.start_step."""
        return AsyncPendingStep(self._core, self._begin(keys, counts, retrieve, append, options))

    async def step(
        self,
        keys: Tensor,
        counts: Sequence[int],
        *,
        retrieve: Retrieval | None,
        append: bool,
        **options: Unpack[StepOptions],
    ) -> StepResult:
        """`start_step` and its result."""
        return await self.start_step(keys, counts, retrieve=retrieve, append=append, **options).result()

    async def retrieve(
        self, keys: Tensor, counts: Sequence[int], retrieve: Retrieval, **options: Unpack[StepOptions]
    ) -> StepResult:
        """What is remembered nearest to `keys`; nothing is appended."""
        return await self.step(keys, counts, retrieve=retrieve, append=False, **options)

    async def append(self, keys: Tensor, counts: Sequence[int], **options: Unpack[StepOptions]) -> StepResult:
        """Appends `keys`; nothing is retrieved."""
        return await self.step(keys, counts, retrieve=None, append=True, **options)

    async def reset(self) -> None:
        """Empties every sequence of the session."""
        await drive_async(Running(self._flows.reset(self._timeout_s)), self._core.clock)

    async def fork(self, source: str, target: str) -> pb.ForkResponse:
        """Gives the new sequence `target` all that `source` holds, the steps under way included."""
        return await drive_async(Running(self._flows.fork(source, target, self._timeout_s)), self._core.clock)


class AsyncMemoryClient(ClientBase):
    """A client for asyncio; see MemoryClient. Close it, or use `async with`."""

    async def info(self) -> pb.ServerInfoResponse:
        """What the server is, can do and allows."""
        return await drive_async(self._begin_info(), self._core.clock)

    async def create_memory(self, name: str, **options: Unpack[MemoryOptions]) -> pb.MemoryDescription:
        """A new memory, all of it reserved; with `exist_ok` an existing one of an equal spec."""
        return (await drive_async(self._begin_create(name, options), self._core.clock)).memory

    async def describe_memory(self, name: str) -> pb.MemoryDescription:
        """Spec and counters of one memory."""
        return (await drive_async(self._begin_describe(name), self._core.clock)).memory

    async def list_memories(self, prefix: str = "") -> list[pb.MemoryDescription]:
        """The memories whose names begin with `prefix`, in the order of their names."""
        return list((await drive_async(self._begin_list(prefix), self._core.clock)).memories)

    async def drop_memory(self, name: str) -> None:
        """Drops a memory with all its rows."""
        await drive_async(self._begin_drop(name), self._core.clock)

    async def reset(self, memory: str, names: Sequence[str], release: bool = False) -> list[int]:
        """Empties sequences, or ends them with `release`; their new epochs, 0 for one that does not exist."""
        return list((await drive_async(self._begin_reset(memory, names, release), self._core.clock)).epochs)

    async def fork(
        self, memory: str, source: str, target: str, *, as_of: int | None = None, epoch: int = 0
    ) -> pb.ForkResponse:
        """Gives the new sequence `target` the live positions of `source` below `as_of`, all if None."""
        return await drive_async(self._begin_fork(memory, source, target, as_of, epoch), self._core.clock)

    async def pin(self, memory: str, names: Sequence[str], *, unpin: bool = False) -> int:
        """Keeps sequences on the device, or lets them go; see MemoryClient.pin."""
        return (await drive_async(self._begin_pin(memory, names, unpin), self._core.clock)).num_pinned

    def session(self, memory: str, sequences: Sequence[str]) -> AsyncSession:
        """A new writer of these sequences of a memory. Nothing is sent."""
        core = self._core_of(memory, sequences)
        return AsyncSession(core, memory, sequences, self._timeout_s, self._row_cache_bytes)

    async def close(self) -> None:
        """Ends every thread and connection; calls under way fail. May be called again."""
        self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
