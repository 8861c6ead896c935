"""Server: wiring, start, drain and stop of one process."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NoReturn

import grpc
import torch
import uvloop
from grpc_health.v1 import health_pb2_grpc

from memstore import garbage, heap, listen, logs
from memstore.admission import Admission, CapacityBudget, QueueLimits
from memstore.auth import authenticator_of, check_bind
from memstore.capacity import capacity_of
from memstore.catalog import Catalog, FileCatalog, NoCatalog, RedisCatalog
from memstore.config import Config, ConfigError
from memstore.descriptors import Handover
from memstore.device import DeviceWorker, device_of
from memstore.door import Door
from memstore.expirer import Expirer
from memstore.gate import Gate
from memstore.grpc_front import SERVICE, FrontLimits, GrpcFront
from memstore.health import Health
from memstore.journal import INTERVAL_S, Syncer
from memstore.lending import TENANT_LEASES, Lending
from memstore.logs import event, trouble
from memstore.metrics import Metrics, MetricsServer, named_memories
from memstore.outcomes import Outcomes
from memstore.quotas import Quotas
from memstore.region import can_share
from memstore.registry import Registry
from memstore.seams import SystemClock, SystemDisk
from memstore.service import VERSION, Service
from memstore.snapshotter import Snapshotter
from memstore.store import FileStore, NoStore, Syncers
from memstore.tokens import Quota

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

    from memstore.seams import Disk
    from memstore.store import Store

_log = logging.getLogger(__name__)


SICK = 70
"""Exit code after a failure of the device that only another process can leave behind."""
SICK_S = 3.0
"""How long the process may take to end then."""


def run(config: Config, disk: Disk | None = None) -> int:
    """Serves until told to stop; the exit code. ConfigError and MemstoreError say why it could not begin."""
    logs.configure(config.log_format, config.log_level)
    check_bind(config)
    heap.tune()
    if config.threads:
        torch.set_num_threads(config.threads)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, ExitStack() as stack:
        stack.enter_context(heap.kept_small(SystemClock()))
        code = runner.run(Server(config, stack, disk or SystemDisk()).serve())
    if code == SICK:
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """Ends the process before its libraries look for the failed device once more, which may abort it."""
    logging.shutdown()
    os._exit(code)


class Server:
    """All parts of one process. What must be undone at the end is left with `stack`."""

    def __init__(self, config: Config, stack: ExitStack, disk: Disk) -> None:
        self._config = config
        self._disk = disk
        self._stack = stack
        self._clock = SystemClock()
        self._deadline = 0.0
        """Until when a stop may take, monotonic seconds."""
        self._authenticator = authenticator_of(config, self._clock)
        default = default_quota(config, has_tenants=self._authenticator.has_tenants)
        self._quotas = Quotas(self._authenticator, default, self._clock)
        stack.enter_context(listen.address_lock(config, disk))
        named = named_memories(config.metrics_memories, has_tenants=self._authenticator.has_tenants)
        self._metrics = Metrics([method.name for method in SERVICE.methods], VERSION, named)
        self._registry = self._make_registry()
        self._metrics.watch(self._registry)
        self._metrics.follow("tokens", lambda: self._authenticator.is_stale)
        self._snapshotter = Snapshotter(self._registry, self._clock, config.snapshot_interval, self._metrics)
        stack.callback(self._snapshotter.close)
        stack.callback(Expirer(self._registry).close)
        self._forget_ready_file()
        stack.callback(self._forget_ready_file)

    def _forget_ready_file(self) -> None:
        if self._config.ready_file is not None:
            self._disk.remove(self._config.ready_file)

    async def serve(self) -> int:
        """From binding to the last answer; the exit code."""
        with self._lending() as lending:
            server, front, health, address = await self._listen(lending)
            stop = self._stop_signals()
            self._end_when_sick(stop)
            loading = self._registry.load()
            try:
                metrics_port = self._serve_metrics(lambda: health.is_serving)
                if await _first(asyncio.wrap_future(loading), stop.wait()):
                    garbage.settle()
                    self._announce(address, metrics_port)
                await stop.wait()
                event(_log, logging.INFO, "draining", grace_s=self._config.grace)
                await self._drain(server, front, stop)
            finally:
                await server.stop(0)
        if self._registry.worker.is_sick:
            event(_log, logging.CRITICAL, "ended by a failure of the device")
            return SICK
        if not await _first(asyncio.to_thread(self._snapshotter.finish), stop.wait_again()):
            self._deadline = 0.0
        event(_log, logging.INFO, "stopped")
        return 0

    def _end_when_sick(self, stop: StopSignals) -> None:
        """Ends the process soon after a failure of the device, whatever hangs, for its supervisor to start it again.

        Logs need no device: what was acknowledged is in them.
        """
        loop = asyncio.get_running_loop()

        def end() -> None:
            timer = threading.Timer(SICK_S, os._exit, (SICK,))
            timer.daemon = True
            timer.start()
            loop.call_soon_threadsafe(stop.give_up)

        self._registry.worker.on_sick = end

    @contextmanager
    def _lending(self) -> Iterator[Lending | None]:
        """What lends memories to processes of this host; None where it shall not, or cannot."""
        lending = None
        loop = asyncio.get_running_loop()
        try:
            if self._lends:
                lending = Lending(self._registry, Handover(loop), loop)
        except OSError as error:
            trouble(_log, "no memory is lent", error)
        try:
            yield lending
        finally:
            if lending is not None:
                lending.close()

    def _make_registry(self) -> Registry:
        config = self._config
        device = device_of(config.device)
        limits = QueueLimits(
            max_requests=config.queue_requests,
            max_bytes=config.queue_bytes,
            tenant_ratio=config.tenant_ratio,
            leaves_room=self._authenticator.has_tenants,
        )
        worker = DeviceWorker(device, Admission(limits), self._clock, self._metrics)
        catalog, store = self._open_catalog()
        budget = CapacityBudget(config.capacity or capacity_of(device))
        self._lends = config.lend == "auto" and can_share(device)
        registry = Registry(
            catalog,
            worker,
            budget,
            self._clock,
            config.max_memories,
            store,
            lends=self._lends,
            quotas=self._quotas,
            host_budget=CapacityBudget(config.host_capacity or capacity_of(torch.device("cpu"))),
        )
        self._stack.callback(lambda: registry.close_files(self._left_s()))
        self._stack.callback(worker.close)
        self._stack.callback(lambda: registry.close(self._left_s()))
        return registry

    def _open_store(self, data: Path) -> Store:
        """The data folder, which is this server's alone."""
        self._stack.enter_context(self._disk.lock(data / "lock"))
        syncers = Syncers(Syncer(0.0), Syncer(INTERVAL_S))
        return FileStore(data, self._disk, self._clock, self._config.disk_quota, self._metrics, syncers)

    def _open_catalog(self) -> tuple[Catalog, Store]:
        config = self._config
        if config.catalog == "none" or config.data is None:
            return NoCatalog(), NoStore()
        store = self._open_store(config.data)
        if config.catalog != "file":
            try:
                catalog = RedisCatalog(config.catalog, config.catalog_prefix)
            except ValueError as error:
                raise ConfigError(f"--catalog: {error}") from error
            self._stack.callback(catalog.close)
            return catalog, store
        return FileCatalog(config.data, self._disk), store

    async def _listen(self, lending: Lending | None) -> tuple[grpc.aio.Server, GrpcFront, Health, str]:
        """Bound before anything is loaded, so that health can say so."""
        config = self._config
        gate, outcomes = Gate(self._authenticator, self._quotas), Outcomes(self._metrics, self._clock)
        door = Door(gate, outcomes, self._clock)
        server = grpc.aio.server(options=listen.SERVER_OPTIONS, interceptors=(door,))
        service = Service(self._registry, self._clock.wall())
        limits = FrontLimits(stream_in_flight=config.stream_in_flight, reply_bytes=config.reply_bytes)
        front = GrpcFront(service, gate, outcomes, self._clock, limits, lending=lending)
        health = Health(self._registry, self._authenticator)
        server.add_generic_rpc_handlers((front.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        listen.add_reflection(server, config, (SERVICE.full_name, "grpc.health.v1.Health"))
        address = listen.bind(server, config, self._clock, self._metrics.follow)
        await server.start()
        event(_log, logging.INFO, "listening", address=address, device=str(self._registry.worker.device))
        return server, front, health, address

    def _serve_metrics(self, is_ready: Callable[[], bool]) -> int:
        """The port of metrics and probes; -1 where there shall be none."""
        config = self._config
        if config.metrics_port < 0:
            return -1
        try:
            server = MetricsServer((config.metrics_host, config.metrics_port), self._metrics, is_ready)
        except OSError as error:
            where = f"{config.metrics_host}:{config.metrics_port}"
            raise ConfigError(
                f"{where}: no port for metrics ({error.strerror}); give another --metrics-port"
            ) from error
        self._stack.callback(server.close)
        return server.port

    def _announce(self, address: str, metrics_port: int) -> None:
        """The one line, and the file, that say that everything is up."""
        metrics = f"http://{self._config.metrics_host}:{metrics_port}" if metrics_port >= 0 else ""
        if self._config.ready_file is not None:
            content = {"address": address, "metrics": metrics, "pid": os.getpid()}
            self._disk.replace(self._config.ready_file, json.dumps(content).encode())
        event(_log, logging.INFO, "ready", address=address, metrics=metrics, capacity_bytes=self._capacity_bytes)

    @property
    def _capacity_bytes(self) -> int:
        return self._registry.budget.capacity_bytes

    def _stop_signals(self) -> StopSignals:
        stop = StopSignals()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.arrived)
        return stop

    def _left_s(self) -> float:
        """What is left of the grace, for files that can be removed by the next server as well."""
        return max(0.0, self._deadline - self._clock.monotonic())

    async def _drain(self, server: grpc.aio.Server, front: GrpcFront, stop: StopSignals) -> None:
        """Refuses what is new, answers what is under way; at the end of the grace, or told again, cuts it off."""
        self._deadline = self._clock.monotonic() + self._config.grace
        self._registry.drain()
        front.drain()
        if not await _first(server.stop(self._config.grace), stop.wait_again()):
            self._deadline = 0.0


class StopSignals:
    """How often the process was told to stop."""

    def __init__(self) -> None:
        self._first = asyncio.Event()
        self._second = asyncio.Event()

    def give_up(self) -> None:
        """Nothing shall be waited for."""
        self._first.set()
        self._second.set()

    def arrived(self) -> None:
        """One more signal."""
        (self._second if self._first.is_set() else self._first).set()

    async def wait(self) -> None:
        """Until the first."""
        await self._first.wait()

    async def wait_again(self) -> None:
        """Until the second."""
        await self._second.wait()


async def _first(wanted: asyncio.Future[None] | Coroutine[None, None, None], stop: Coroutine[None, None, None]) -> bool:
    """Waits for either; True where `wanted` is done, whose error is raised."""
    task, stopped = asyncio.ensure_future(wanted), asyncio.ensure_future(stop)
    await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not task.done():
        return False
    task.result()
    return True


def default_quota(config: Config, *, has_tenants: bool) -> Quota:
    """What a tenant may take of which the file of tokens says nothing."""
    return Quota(
        reserved_bytes=config.tenant_bytes,
        sequences=config.tenant_sequences,
        calls_per_s=config.tenant_calls,
        spilled_bytes=config.tenant_spilled_bytes,
        leases=config.tenant_leases or (TENANT_LEASES if has_tenants else 0),
    )
