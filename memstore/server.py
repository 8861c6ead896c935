"""Server: wiring, start, drain and stop of one process."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

import grpc
import torch
import uvloop
from grpc_health.v1 import health_pb2_grpc

from memstore import listen, logs
from memstore.admission import Admission, CapacityBudget, QueueLimits
from memstore.auth import authenticator_of, check_bind
from memstore.capacity import capacity_of
from memstore.catalog import Catalog, FileCatalog, NoCatalog, RedisCatalog
from memstore.config import Config, ConfigError
from memstore.device import DeviceWorker, device_of
from memstore.grpc_front import SERVICE, GrpcFront
from memstore.health import Health
from memstore.logs import event
from memstore.metrics import Metrics, MetricsServer
from memstore.registry import Registry
from memstore.seams import SystemClock, SystemDisk
from memstore.service import VERSION, Service

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_log = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Serves until told to stop; the exit code. ConfigError and MemstoreError say why it could not begin."""
    logs.configure(config.log_format, config.log_level)
    check_bind(config)
    _tune_malloc()
    if config.threads:
        torch.set_num_threads(config.threads)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, ExitStack() as stack:
        runner.run(Server(config, stack).serve())
    return 0


class Server:
    """All parts of one process. What must be undone at the end is left with `stack`."""

    def __init__(self, config: Config, stack: ExitStack) -> None:
        self._config = config
        self._stack = stack
        self._clock = SystemClock()
        self._authenticator = authenticator_of(config)
        stack.enter_context(listen.address_lock(config, SystemDisk()))
        self._metrics = Metrics([method.name for method in SERVICE.methods], VERSION, config.metrics_memories)
        self._registry = self._make_registry()
        self._metrics.watch(self._registry)
        self._forget_ready_file()
        stack.callback(self._forget_ready_file)

    def _forget_ready_file(self) -> None:
        if self._config.ready_file is not None:
            SystemDisk().remove(self._config.ready_file)

    async def serve(self) -> None:
        """From binding to the last answer."""
        server, front, health, address = await self._listen()
        stop = self._stop_signals()
        loading = self._registry.load()
        try:
            metrics_port = self._serve_metrics(lambda: health.is_serving)
            if await _first(asyncio.wrap_future(loading), stop.wait()):
                self._announce(address, metrics_port)
            await stop.wait()
            event(_log, logging.INFO, "draining", grace_s=self._config.grace)
            await self._drain(server, front, stop)
        finally:
            await server.stop(0)
        event(_log, logging.INFO, "stopped")

    def _make_registry(self) -> Registry:
        config = self._config
        device = device_of(config.device)
        limits = QueueLimits(
            max_requests=config.queue_requests, max_bytes=config.queue_bytes, tenant_ratio=config.tenant_ratio
        )
        worker = DeviceWorker(device, Admission(limits), self._clock, self._metrics)
        self._stack.callback(worker.close)
        budget = CapacityBudget(config.capacity or capacity_of(device))
        registry = Registry(self._open_catalog(), worker, budget, self._clock, config.max_memories)
        self._stack.callback(registry.close)
        return registry

    def _open_catalog(self) -> Catalog:
        config = self._config
        if config.catalog == "none" or config.data is None:
            return NoCatalog()
        if config.catalog != "file":
            try:
                catalog = RedisCatalog(config.catalog, config.catalog_prefix)
            except ValueError as error:
                raise ConfigError(f"--catalog: {error}") from error
            self._stack.callback(catalog.close)
            return catalog
        disk = SystemDisk()
        self._stack.enter_context(disk.lock(config.data / "lock"))
        return FileCatalog(config.data, disk)

    async def _listen(self) -> tuple[grpc.aio.Server, GrpcFront, Health, str]:
        """Bound before anything is loaded, so that health can say so."""
        config = self._config
        server = grpc.aio.server(options=listen.SERVER_OPTIONS)
        service = Service(self._registry, self._clock.wall())
        front = GrpcFront(
            service, self._authenticator, self._metrics, self._clock, stream_in_flight=config.stream_in_flight
        )
        health = Health(self._registry)
        server.add_generic_rpc_handlers((front.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        listen.add_reflection(server, config, (SERVICE.full_name, "grpc.health.v1.Health"))
        address = listen.bind(server, config)
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
            SystemDisk().replace(self._config.ready_file, json.dumps(content).encode())
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

    async def _drain(self, server: grpc.aio.Server, front: GrpcFront, stop: StopSignals) -> None:
        """Refuses what is new, answers what is under way; at the end of the grace, or told again, cuts it off."""
        self._registry.drain()
        front.drain()
        await _first(server.stop(self._config.grace), stop.wait_again())


class StopSignals:
    """How often the process was told to stop."""

    def __init__(self) -> None:
        self._first = asyncio.Event()
        self._second = asyncio.Event()

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


def _tune_malloc() -> None:
    """Keeps glibc from mapping and unmapping every large message, which costs more than copying it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        mallopt(-2, 64 << 20)  # M_TOP_PAD
