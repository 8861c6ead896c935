"""Registry: the memories in service; keeps capacity budget, catalogue and device in step."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

from google.protobuf import json_format

from memstore import wire
from memstore.catalog import MemoryId
from memstore.errors import AlreadyExists, Corrupt, InvalidRequest, MemstoreError, NotFound, NotReady, QuotaExceeded
from memstore.index import build_thread
from memstore.logs import event, trouble
from memstore.memory import Memory
from memstore.seams import new_epoch
from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from memstore.admission import CapacityBudget
    from memstore.catalog import Catalog
    from memstore.device import DeviceWorker
    from memstore.seams import Clock
    from memstore.types import MemorySpec

T = TypeVar("T")
RETRY_LOAD_S = 1.0
_log = logging.getLogger(__name__)


class State(Enum):
    """Where the registry is in its life."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A memory in service. Its engine is touched by the device thread only. created_at: Unix seconds."""

    id: MemoryId
    engine: Memory
    created_at: float

    @property
    def spec(self) -> MemorySpec:
        """What it is."""
        return self.engine.spec


class Registry:
    """The memories of all tenants on one device.

    Changes run one at a time in a thread of their own, so that a slow catalogue holds up neither device nor loop.
    """

    def __init__(
        self, catalog: Catalog, worker: DeviceWorker, budget: CapacityBudget, clock: Clock, max_memories: int
    ) -> None:
        self.state = State.LOADING
        self.worker = worker
        self.budget = budget
        self.on_change: Callable[[], None] = _nobody
        self._catalog = catalog
        self._clock = clock
        self._max_memories = max_memories
        self._loaded: dict[MemoryId, Loaded] = {}
        self._stopping = threading.Event()
        self._admin = ThreadPoolExecutor(max_workers=1, thread_name_prefix="memstore-admin")
        self._builds = build_thread()

    def load(self) -> Future[None]:
        """Reserves every memory of the catalogue, empty, in the background; tries again while that is out of reach."""
        return self._admin.submit(self._load)

    def drain(self) -> None:
        """Takes no more changes; the memories go on."""
        self.state = State.DRAINING
        self._stopping.set()
        self.on_change()

    def close(self) -> None:
        """Drains, and ends the background work; the memories stay until the device worker is closed."""
        self.on_change = _nobody
        self.drain()
        self._admin.shutdown(wait=True)
        with suppress(NotReady):  # the worker is closed already
            for loaded in self.all():
                self.worker.control(loaded.engine.stop_builds)
        self._builds.shutdown(wait=True, cancel_futures=True)

    def find(self, tenant: str, name: str, field: str = "memory") -> Loaded:
        """A memory in service; `field` is where its name stood. Raises NotFound; NotReady while it may be loading."""
        loaded = self._loaded.get(MemoryId(tenant, wire.memory_name(name, field)))
        if loaded is None:
            if self.state is State.LOADING:
                raise NotReady("memories are being loaded")
            raise NotFound(f"no memory {name!r}", memory=name)
        return loaded

    def is_loaded(self, tenant: str, name: str) -> bool:
        """True where a memory is in service."""
        return MemoryId(tenant, name) in self._loaded

    def all(self) -> list[Loaded]:
        """Every memory in service."""
        return list(self._loaded.values())

    def create(self, memory: MemoryId, spec: MemorySpec, exist_ok: bool) -> Future[tuple[Loaded, bool]]:
        """The memory, and whether it is new. AlreadyExists, DeviceMemoryFull, QuotaExceeded, NotReady."""
        return self._change(lambda: self._create(memory, spec, exist_ok))

    def drop(self, memory: MemoryId) -> Future[None]:
        """Takes a memory out of catalogue and device. NotFound, NotReady."""
        return self._change(lambda: self._drop(memory))

    def listing(self, tenant: str, prefix: str) -> Future[list[Loaded | MemorySpec]]:
        """A tenant's memories whose names begin with `prefix`, by name; only the spec of one that is not loaded.

        NotReady when the catalogue is out of reach.
        """
        return self._change(lambda: self._list(tenant, prefix))

    def _change(self, run: Callable[[], T]) -> Future[T]:
        if self.state is not State.SERVING:
            raise NotReady(f"the server is {self.state.value}")
        return self._admin.submit(run)

    def _create(self, memory: MemoryId, spec: MemorySpec, exist_ok: bool) -> tuple[Loaded, bool]:
        existing = self._loaded.get(memory)
        if existing is not None:
            if exist_ok and existing.spec == spec:
                return existing, False
            how = "an equal" if existing.spec == spec else "another"
            raise AlreadyExists(f"memory {memory.name!r} exists with {how} spec", memory=memory.name)
        if len(self._loaded) >= self._max_memories:
            raise QuotaExceeded(f"{self._max_memories} memories exist, as many as this server may have")
        loaded = self._reserve(memory, spec, self._clock.wall())
        try:
            self._catalog.put(memory, _text_of(loaded))
        except MemstoreError:
            self._free(loaded)
            raise
        self._loaded[memory] = loaded
        event(_log, logging.INFO, "memory created", memory=memory.name, reserved_bytes=loaded.engine.reserved_bytes)
        self.on_change()
        return loaded, True

    def _drop(self, memory: MemoryId) -> None:
        loaded = self._loaded.get(memory)
        if loaded is None:
            raise NotFound(f"no memory {memory.name!r}", memory=memory.name)
        self._catalog.remove(memory)
        del self._loaded[memory]
        self._free(loaded)
        event(_log, logging.INFO, "memory dropped", memory=memory.name)
        self.on_change()

    def _list(self, tenant: str, prefix: str) -> list[Loaded | MemorySpec]:
        found: dict[MemoryId, Loaded | MemorySpec] = {}
        for memory, text in self._catalog.load().items():
            with suppress(Corrupt):
                found[memory] = _spec_of(memory, text)[0]
        found |= self._loaded
        return [found[memory] for memory in sorted(found) if memory.tenant == tenant and memory.name.startswith(prefix)]

    def _reserve(self, memory: MemoryId, spec: MemorySpec, created_at: float) -> Loaded:
        device = self.worker.device
        needed = Memory.bytes_needed(spec, device)
        self.budget.reserve(needed)
        try:
            make = self.worker.control(lambda: Memory(spec, device, new_epoch=new_epoch, builds=self._builds))
            return Loaded(id=memory, engine=make.result(), created_at=created_at)
        except BaseException:
            self.budget.release(needed)
            raise

    def _free(self, loaded: Loaded) -> None:
        self.worker.control(loaded.engine.free).result()
        loaded.engine.join()
        self.budget.release(loaded.engine.reserved_bytes)

    def _load(self) -> None:
        while not self._stopping.is_set():
            try:
                texts = self._catalog.load()
                break
            except NotReady as error:
                event(_log, logging.WARNING, "catalogue out of reach, trying again", reason=error.message)
                self._stopping.wait(RETRY_LOAD_S)
        else:
            return
        for memory, text in sorted(texts.items()):
            if self._stopping.is_set():
                return
            self._load_one(memory, text)
        if self.state is State.LOADING:
            self.state = State.SERVING
        event(_log, logging.INFO, "memories loaded", num_memories=len(self._loaded))
        self.on_change()

    def _load_one(self, memory: MemoryId, text: str) -> None:
        """One memory; what cannot be loaded is logged and left out, so that the others serve."""
        try:
            spec, created_at = _spec_of(memory, text)
            self._loaded[memory] = self._reserve(memory, spec, created_at)
            self.on_change()
        except MemstoreError as error:
            trouble(_log, "memory not loaded", error, memory=ascii(memory.name))


def _nobody() -> None:
    """Nobody listens for changes."""


def _text_of(loaded: Loaded) -> str:
    description = pb.MemoryDescription(spec=wire.encode_spec(loaded.spec))
    description.status.created_at.CopyFrom(wire.encode_time(loaded.created_at))
    return str(json_format.MessageToJson(description, indent=None))


def _spec_of(memory: MemoryId, text: str) -> tuple[MemorySpec, float]:
    """Spec and time of creation as the catalogue has them, checked as any outside input. Raises Corrupt."""
    try:
        description = json_format.Parse(text, pb.MemoryDescription())
        spec = wire.decode_spec(description.spec)
    except (json_format.ParseError, InvalidRequest) as error:
        raise Corrupt(f"the catalogue's entry of memory {memory.name!a} is not a spec: {error}") from error
    if spec.name != memory.name:
        raise Corrupt(f"the catalogue has {spec.name!r} under {memory.name!a}")
    return spec, description.status.created_at.ToMicroseconds() / 1e6
