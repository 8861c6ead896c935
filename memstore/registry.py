"""Registry: the memories in service; keeps capacity budget, catalogue and device in step."""

from __future__ import annotations

import logging
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from memstore import wire
from memstore.admission import CapacityBudget
from memstore.auth import Open
from memstore.catalog import MemoryId
from memstore.entries import identity, spec_of, text_of
from memstore.errands import Errands, run
from memstore.errors import AlreadyExists, Corrupt, Internal, MemstoreError, NotFound, NotReady, QuotaExceeded
from memstore.futures import then
from memstore.index import prepare
from memstore.logs import event, trouble
from memstore.quotas import Held, Quotas
from memstore.removals import Removals
from memstore.rooms import Loaded, Rooms
from memstore.store import NoStore
from memstore.tokens import Quota
from memstore.turns import SERVER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from memstore.archive import Archive
    from memstore.catalog import Catalog
    from memstore.device import DeviceWorker
    from memstore.errands import Steps
    from memstore.memory import Memory
    from memstore.seams import Clock
    from memstore.store import Store
    from memstore.types import MemorySpec

T = TypeVar("T")
RETRY_LOAD_S, LONGEST_RETRY_LOAD_S = 1.0, 60.0
"""How long the catalogue, or files that cannot be read for now, are left alone before they are tried again."""
_log = logging.getLogger(__name__)


class State(Enum):
    """Where the registry is in its life."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


class Registry:
    """The memories of all tenants on one device.

    Changes run in a thread of their own (errands.py), so that a slow catalogue holds up neither device nor loop; those
    of one tenant one at a time. What they need of the device is done in its turn, and no other tenant's change waits.
    What is left of a memory that was dropped is removed in other threads (removals.py): nobody waits for the jobs of
    its tenant that are still queued, nor for its files. Until its bytes are given back its name is taken.
    """

    def __init__(
        self,
        catalog: Catalog,
        worker: DeviceWorker,
        budget: CapacityBudget,
        clock: Clock,
        max_memories: int,
        store: Store | None = None,
        *,
        lends: bool = False,
        quotas: Quotas | None = None,
        host_budget: CapacityBudget | None = None,
    ) -> None:
        """store: where durable memories are kept; nowhere without one.

        lends: memories are reserved so that they can be lent to other processes, where that is possible. quotas: what
        tenants may take; no bounds if None. host_budget: of host memory for sequences that are spilled from another
        device; no bound but the host's if None.
        """
        self.quotas = quotas or Quotas(Open(), Quota(), clock)
        self.state = State.LOADING
        self.worker = worker
        self.budget = budget
        self.on_change: Callable[[], None] = _nobody
        self._catalog = catalog
        self._clock = clock
        self._max_memories = max_memories
        self._store = store or NoStore()
        host = host_budget or CapacityBudget(sys.maxsize)
        self._rooms = Rooms(worker, (budget, host), clock, self._store, self.quotas, lends=lends)
        self._loaded: dict[MemoryId, Loaded] = {}
        self._unloaded: dict[MemoryId, MemstoreError] = {}  # those of the catalogue, and why; NotReady: tried again
        self._removals = Removals(self._rooms, self._store)
        self._reloading: threading.Thread | None = None
        self._stopping = threading.Event()
        self._num_begun = 0  # memories that are being made
        self._errands = Errands("memstore-admin")

    def load(self) -> Future[None]:
        """Reserves every memory of the catalogue, and fills the durable ones, in the background.

        Tries again while the catalogue is out of reach.
        """
        return self._errands.submit(self._load)

    def drain(self) -> None:
        """Takes no more changes; the memories go on."""
        self.state = State.DRAINING
        self._stopping.set()
        self._store.stop()
        self.on_change()

    def close(self, patience_s: float | None = None) -> None:
        """Drains, and ends the background work; the memories stay until the device worker is closed.

        patience_s: how long to wait for the removal of those that were dropped, which the next start goes on with; as
        long as it takes if None. Once the worker is closed, `close_files` may be called.
        """
        self.on_change = _nobody
        self.drain()
        if self._reloading is not None:
            self._reloading.join()
        self._errands.close()
        self._removals.close(patience_s)
        with suppress(NotReady):  # the worker is closed already
            for loaded in self.all():
                self.worker.control(loaded.engine.stop_builds)
        self._rooms.close()

    def close_files(self, patience_s: float | None = None) -> None:
        """Makes everything that was written safe, and says so in the files. The device worker is closed.

        patience_s: as in `close`, for the files of sequences that were spilled.
        """
        for loaded in self._loaded.values():
            if loaded.archive is not None:
                try:
                    loaded.archive.close()
                except OSError as error:
                    trouble(_log, "memory not closed in order", error, memory=ascii(loaded.id.name))
        self._store.close(patience_s)

    def find(self, tenant: str, name: str, field: str = "memory") -> Loaded:
        """A memory in service; `field` is where its name stood.

        Raises NotFound; NotReady while it may be loading, or its files cannot be read for now; Corrupt, or what else
        kept it, where it cannot be loaded.
        """
        memory = MemoryId(tenant, wire.memory_name(name, field))
        loaded = self._loaded.get(memory)
        if loaded is None:
            if memory in self._unloaded:
                raise self._reason(memory)
            if self.state is State.LOADING:
                raise NotReady("memories are being loaded")
            raise NotFound(f"no memory {name!r}", memory=name)
        return loaded

    def is_loaded(self, tenant: str, name: str) -> bool:
        """True where a memory is in service."""
        return MemoryId(tenant, name) in self._loaded

    def held(self, tenant: str) -> Held:
        """What the memories of a tenant have reserved, with those that were dropped until they have given it back."""
        own = [loaded for loaded in (*self.all(), *self._removals.going()) if loaded.id.tenant == tenant]
        return Held(
            reserved_bytes=sum(self._rooms.reserved_bytes(loaded.spec) for loaded in own),
            sequences=sum(loaded.spec.total_sequences for loaded in own),
        )

    @property
    def num_damaged(self) -> int:
        """Memories of the catalogue that could not be loaded."""
        return len(self._unloaded) - self.num_waiting

    @property
    def num_waiting(self) -> int:
        """Memories of the catalogue that could not be read until now, though nothing says that they are damaged."""
        return sum(isinstance(error, NotReady) for error in list(self._unloaded.values()))

    def all(self) -> list[Loaded]:
        """Every memory in service."""
        return list(self._loaded.values())

    def create(self, memory: MemoryId, spec: MemorySpec, exist_ok: bool) -> Future[tuple[Loaded, bool]]:
        """The memory, and whether it is new. AlreadyExists, DeviceMemoryFull, QuotaExceeded, NotReady."""
        return self._change(memory.tenant, self._create(memory, spec, exist_ok))

    def drop(self, memory: MemoryId) -> Future[None]:
        """Takes a memory out of catalogue and device, and returns when its files are gone too. NotFound, NotReady."""
        return then(self._change(memory.tenant, self._drop(memory)), lambda removal: removal)

    def listing(self, tenant: str, prefix: str) -> Future[list[Loaded | MemorySpec]]:
        """A tenant's memories whose names begin with `prefix`, by name; only the spec of one that is not loaded.

        NotReady when the catalogue is out of reach.
        """
        return self._change(tenant, self._list(tenant, prefix))

    def _change(self, tenant: str, steps: Steps[T]) -> Future[T]:
        if self.state is not State.SERVING:
            raise NotReady(f"the server is {self.state.value}")
        return self._errands.add(tenant, steps)

    def _create(self, memory: MemoryId, spec: MemorySpec, exist_ok: bool) -> Steps[tuple[Loaded, bool]]:
        existing = self._loaded.get(memory)
        if existing is not None:
            if exist_ok and existing.spec == spec:
                return existing, False
            how = "an equal" if existing.spec == spec else "another"
            raise AlreadyExists(f"memory {memory.name!r} exists with {how} spec", memory=memory.name)
        if memory in self._unloaded:
            raise self._reason(memory)
        if memory in self._removals:
            raise NotReady(f"memory {memory.name!r} was dropped, and is still being removed")
        if len(self._loaded) + len(self._removals) + self._num_begun >= self._max_memories:
            raise QuotaExceeded("the server has as many memories as it may have (max_memories)")
        needed = Held(reserved_bytes=self._rooms.reserved_bytes(spec), sequences=spec.total_sequences)
        self.quotas.check(memory.tenant, self.held(memory.tenant), needed)
        self._store.check(spec)
        created_at = self._clock.wall()
        text = text_of(spec, created_at)
        keep = partial(self._store.create, memory, identity(memory, text))
        self._num_begun += 1
        try:
            loaded = yield from self._make(memory, spec, created_at, keep)
        finally:
            self._num_begun -= 1
        try:
            self._catalog.put(memory, text)
        except MemstoreError:
            yield self._removals.begin(memory, loaded)
            raise
        self._loaded[memory] = loaded
        event(_log, logging.INFO, "memory created", memory=memory.name, reserved_bytes=loaded.engine.reserved_bytes)
        self.on_change()
        return loaded, True

    def _drop(self, memory: MemoryId) -> Steps[Future[None]]:
        loaded = self._loaded.get(memory)
        if loaded is None and memory not in self._unloaded:
            raise NotFound(f"no memory {memory.name!r}", memory=memory.name)
        self._store.mark_passing(memory)
        try:
            self._catalog.remove(memory)
        except MemstoreError:
            self._store.forget_passing(memory)
            raise
        self._loaded.pop(memory, None)
        self._unloaded.pop(memory, None)
        removal = self._removals.begin(memory, loaded)
        event(_log, logging.INFO, "memory dropped", memory=memory.name)
        self.on_change()
        return removal
        yield  # nothing is waited for

    def _reason(self, memory: MemoryId) -> MemstoreError:
        """What kept a memory from being loaded, without the frames, and requests, of those who were told before."""
        return self._unloaded[memory].with_traceback(None)

    def _list(self, tenant: str, prefix: str) -> Steps[list[Loaded | MemorySpec]]:
        found: dict[MemoryId, Loaded | MemorySpec] = {}
        for memory, text in self._catalog.load().items():
            with suppress(Corrupt):
                found[memory] = spec_of(memory, text)[0]
        found |= self._loaded
        return [found[memory] for memory in sorted(found) if memory.tenant == tenant and memory.name.startswith(prefix)]
        yield  # nothing is waited for

    def _make(
        self, memory: MemoryId, spec: MemorySpec, created_at: float, keep: Callable[[Memory], Archive | None]
    ) -> Steps[Loaded]:
        """See Rooms.make."""
        lane = SERVER if self.state is State.LOADING else memory.tenant
        engine, archive = yield from self._rooms.make(memory, spec, keep, lane)
        return Loaded(id=memory, engine=engine, created_at=created_at, archive=archive)

    def _retire_orphans(self, known: Iterable[MemoryId]) -> None:
        """What an earlier server left; that takes long which is done beside what follows."""
        try:
            self._store.retire_orphans(known)
        except NotReady as error:
            trouble(_log, "what an earlier server left is not found", error)
        self._removals.submit(SERVER, self._remove_rest)

    def _remove_rest(self) -> None:
        try:
            self._store.remove_rest()
        except NotReady as error:
            trouble(_log, "what an earlier server left is not removed", error)

    def _load(self) -> None:
        prepare(self.worker.device)
        while not self._stopping.is_set():
            try:
                texts = self._catalog.load()
                break
            except NotReady as error:
                event(_log, logging.WARNING, "catalogue out of reach, trying again", reason=error.message)
                self._stopping.wait(RETRY_LOAD_S)
        else:
            return
        self._retire_orphans(texts)
        for memory, text in sorted(texts.items()):
            if self._stopping.is_set():
                return
            run(self._load_one(memory, text))
        if self.state is State.LOADING:
            self.state = State.SERVING
        event(_log, logging.INFO, "memories loaded", num_memories=len(self._loaded))
        self.on_change()
        if self.num_waiting:
            self._reloading = threading.Thread(target=self._reload, args=(texts,), name="memstore-reload", daemon=True)
            self._reloading.start()

    def _reload(self, texts: Mapping[MemoryId, str]) -> None:
        """Tries memories again whose files could not be read, until none waits: at longer and longer intervals.

        In this thread, as it may take long; meanwhile changes of the same tenant wait for it, and of no other.
        """
        delay_s = RETRY_LOAD_S
        while self.num_waiting and not self._stopping.wait(delay_s):
            delay_s = min(2 * delay_s, LONGEST_RETRY_LOAD_S)
            for memory in [memory for memory, error in list(self._unloaded.items()) if isinstance(error, NotReady)]:
                turn, is_over = Future[None](), Future[None]()
                self._errands.add(memory.tenant, _kept_for(turn, is_over))
                turn.result()
                try:
                    if memory in self._unloaded and not self._stopping.is_set():  # it may have been dropped
                        run(self._load_one(memory, texts[memory]))
                finally:
                    is_over.set_result(None)

    def _load_one(self, memory: MemoryId, text: str) -> Steps[None]:
        """One memory; what cannot be loaded is logged and left out, so that the others serve."""
        try:
            spec, created_at = spec_of(memory, text)
            keep = partial(self._fill, memory, text)
            self._loaded[memory] = yield from self._make(memory, spec, created_at, keep)
            self._unloaded.pop(memory, None)
            self.on_change()
        except Exception as error:  # a root: a bug in reading one memory must not keep the others from being read
            self._unloaded[memory] = error if isinstance(error, MemstoreError) else Internal("load")
            if not (self._stopping.is_set() and isinstance(error, NotReady)):
                trouble(_log, "memory not loaded", error, memory=ascii(memory.name))

    def _fill(self, memory: MemoryId, text: str, engine: Memory) -> Archive | None:
        """Nobody else has the engine yet, so that the device thread goes on with others meanwhile."""
        with torch.no_grad():
            archive = self._store.recover(memory, identity(memory, text), engine)
        if archive is not None:
            try:
                self.worker.control(engine.wake).result()
            except BaseException:
                self._store.let_go(archive, engine.spec)
                raise
        return archive


def _kept_for(turn: Future[None], is_over: Future[None]) -> Steps[None]:
    """The turn of a tenant's changes, for another thread: from when it is told until it says so."""
    turn.set_result(None)
    yield is_over


def _nobody() -> None:
    """Nobody listens for changes."""
