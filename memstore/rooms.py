"""Rooms: memories on a device, made and given back, with what each reserves there and of the host beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memstore.index import build_thread
from memstore.memory import Memory
from memstore.seams import new_epoch
from memstore.tiers import host_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from memstore.admission import CapacityBudget
    from memstore.archive import Archive
    from memstore.catalog import MemoryId
    from memstore.device import DeviceWorker
    from memstore.errands import Steps
    from memstore.quotas import Quotas
    from memstore.seams import Clock
    from memstore.store import Store
    from memstore.types import MemorySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A memory in service. Its engine is touched by the device thread only.

    created_at: Unix seconds. archive: its files, where it is durable.
    """

    id: MemoryId
    engine: Memory
    created_at: float
    archive: Archive | None = None

    @property
    def spec(self) -> MemorySpec:
        """What it is."""
        return self.engine.spec


class Rooms:
    """See above. Thread safe, one call of a memory at a time."""

    def __init__(
        self,
        worker: DeviceWorker,
        budgets: tuple[CapacityBudget, CapacityBudget],
        clock: Clock,
        store: Store,
        quotas: Quotas,
        *,
        lends: bool,
    ) -> None:
        """budgets: of the device, and of the host beside it. For the rest see Registry."""
        self._worker = worker
        self._budget, self._host_budget = budgets
        self._clock = clock
        self._store = store
        self._quotas = quotas
        self._lends = lends
        self._builds = build_thread()

    def reserved_bytes(self, spec: MemorySpec) -> int:
        """Bytes that a memory of this spec reserves, of the device and of the host beside it."""
        return self._device_bytes(spec) + self._host_bytes(spec)

    def make(
        self, memory: MemoryId, spec: MemorySpec, keep: Callable[[Memory], Archive | None], lane: str
    ) -> Steps[tuple[Memory, Archive | None]]:
        """A memory on the device. keep: begins its files, or fills it with what they hold. lane: whose jobs go before.

        Raises DeviceMemoryFull, and what `keep` raises; nothing is reserved then.
        """
        device, is_shared = self._worker.device, self._is_shared(spec)
        self._reserve(spec)
        try:
            engine = yield self._worker.control(
                lambda: Memory(spec, device, new_epoch=new_epoch, builds=self._builds, is_shared=is_shared), behind=lane
            )
            try:
                self._prepare(memory, engine)
                archive = keep(engine)
                self._bound(engine)
                return engine, archive
            except BaseException:
                yield self._worker.control(engine.free, behind=lane)
                engine.remove_files()
                raise
        except BaseException:
            self._release(spec)
            raise

    def give_back(self, memory: MemoryId, engine: Memory) -> None:
        """Frees a memory, once what its tenant has queued before is done. Its files are still to be removed."""
        self._worker.control(engine.free, behind=memory.tenant).result()
        engine.join()
        self._release(engine.spec)

    def close(self) -> None:
        """Ends the thread that builds indexes; nothing is made any more."""
        self._builds.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, memory: MemoryId, engine: Memory) -> None:
        """Gives a memory time, and room for what leaves it."""
        engine.lifecycle.clock = self._clock
        if engine.lifecycle.spill is not None:
            files = engine.lifecycle.spill.tiers.files
            files.folder, files.allowance = self._store.spill_folder(memory), self._quotas.spilled(memory.tenant)
            files.is_filling = True

    def _bound(self, engine: Memory) -> None:
        """From now on the tenant's quota bounds what is spilled; a quota that was lowered takes nothing away."""
        if engine.lifecycle.spill is not None:
            engine.lifecycle.spill.tiers.files.is_filling = False

    def _reserve(self, spec: MemorySpec) -> None:
        self._host_budget.reserve(self._host_bytes(spec))
        try:
            self._budget.reserve(self._device_bytes(spec))
        except BaseException:
            self._host_budget.release(self._host_bytes(spec))
            raise

    def _release(self, spec: MemorySpec) -> None:
        self._budget.release(self._device_bytes(spec))
        self._host_budget.release(self._host_bytes(spec))

    def _is_shared(self, spec: MemorySpec) -> bool:
        return self._lends and Memory.can_be_lent(spec)

    def _device_bytes(self, spec: MemorySpec) -> int:
        return Memory.bytes_needed(spec, self._worker.device, is_shared=self._is_shared(spec))

    def _host_bytes(self, spec: MemorySpec) -> int:
        """Bytes of host memory beside those of the device."""
        return 0 if self._worker.device.type == "cpu" else host_bytes(spec)
