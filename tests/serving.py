"""A real gRPC server of memstore on a free loopback port, its event loop in a thread, its limits the test's."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import torch
import uvloop
from grpc_health.v1 import health_pb2_grpc

from memstore.admission import Admission, CapacityBudget, QueueLimits
from memstore.auth import Open
from memstore.catalog import Catalog, FileCatalog, NoCatalog
from memstore.config import Config
from memstore.descriptors import Handover
from memstore.device import DeviceWorker, device_of
from memstore.door import Door
from memstore.gate import Gate
from memstore.grpc_front import SERVICE, FrontLimits, GrpcFront
from memstore.health import Health
from memstore.lending import Lending
from memstore.listen import SERVER_OPTIONS, add_reflection
from memstore.metrics import Metrics, named_memories
from memstore.outcomes import Outcomes
from memstore.quotas import Quotas
from memstore.registry import Registry
from memstore.seams import Clock, SystemClock
from memstore.service import VERSION, Service
from memstore.store import FileStore, NoStore, Store, Syncers
from memstore.tokens import Quota
from memstore.v1 import memstore_pb2 as pb
from memstore.v1 import memstore_pb2_grpc
from tests.fakes import Diligent, FakeClock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from memstore.auth import Authenticator
    from memstore.seams import Disk


@dataclass(kw_only=True)
class Setting:
    """What a test decides about its server."""

    authenticator: Authenticator = field(default_factory=Open)
    limits: QueueLimits = field(default_factory=QueueLimits)
    catalog: Catalog = field(default_factory=NoCatalog)
    store: Store = field(default_factory=NoStore)
    clock: Clock = field(default_factory=SystemClock)
    capacity_bytes: int = 1 << 30
    max_memories: int = 100
    front: FrontLimits = field(default_factory=lambda: FrontLimits(stream_in_flight=4))
    port: int = 0
    lends: bool = False
    quota: Quota = field(default_factory=Quota)
    device: str = "cpu"


@dataclass(kw_only=True)
class Serving:
    """A server that runs, and a connection to it."""

    target: str
    channel: grpc.Channel
    stub: memstore_pb2_grpc.MemoryServiceStub
    registry: Registry
    front: GrpcFront
    health: Health
    metrics: Metrics
    loop: asyncio.AbstractEventLoop
    lending: Lending | None

    def drain(self) -> None:
        """Begins draining, as a signal does."""
        self.registry.drain()
        self.loop.call_soon_threadsafe(self.front.drain)


@contextmanager
def serving(setting: Setting | None = None, *, loads: bool = True) -> Iterator[Serving]:
    """Serves for the length of the block. loads: waits until the catalogue's memories are there."""
    setting = setting or Setting()
    named = named_memories(-1, has_tenants=setting.authenticator.has_tenants)
    metrics = Metrics([method.name for method in SERVICE.methods], VERSION, named)
    worker = DeviceWorker(device_of(setting.device), Admission(setting.limits), setting.clock, metrics)
    budget = CapacityBudget(setting.capacity_bytes)
    registry = Registry(
        setting.catalog,
        worker,
        budget,
        setting.clock,
        setting.max_memories,
        setting.store,
        lends=setting.lends,
        quotas=Quotas(setting.authenticator, setting.quota, setting.clock),
    )
    metrics.watch(registry)
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    starting = asyncio.run_coroutine_threadsafe(_start(setting, registry, metrics), loop)
    server, front, health, port, lending = starting.result()
    try:
        if loads:
            registry.load().result()
        target = f"127.0.0.1:{port}"
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        options.append(("grpc.http2.bdp_probe", 0))  # what a reader that does not read takes in stays small
        with grpc.insecure_channel(target, options=options) as channel:
            yield Serving(
                target=target,
                channel=channel,
                stub=memstore_pb2_grpc.MemoryServiceStub(channel),
                registry=registry,
                front=front,
                health=health,
                metrics=metrics,
                loop=loop,
                lending=lending,
            )
    finally:
        if lending is not None:
            asyncio.run_coroutine_threadsafe(_close(lending), loop).result()
        registry.close()
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result()
        worker.close()
        registry.close_files()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Unwatched:
    """Nobody looks at the files."""

    def recovered(self, cut_bytes: int, seconds: float) -> None:
        """Nothing is said."""

    def snapshot(self, outcome: str, seconds: float) -> None:
        """Nothing is said."""


def file_store(data: Path, disk: Disk, clock: Clock, quota_bytes: int = 0) -> FileStore:
    """A store whose journals are synced at once."""
    return FileStore(data, disk, clock, quota_bytes, Unwatched(), Syncers(Diligent(), Diligent()))


def on_disk(data: Path, disk: Disk, quota_bytes: int = 0) -> Setting:
    """A server whose catalogue and memories are in a folder of this disk."""
    return Setting(catalog=FileCatalog(data, disk), store=file_store(data, disk, FakeClock(), quota_bytes))


async def _start(
    setting: Setting, registry: Registry, metrics: Metrics
) -> tuple[grpc.aio.Server, GrpcFront, Health, int, Lending | None]:
    gate, outcomes = Gate(setting.authenticator, registry.quotas), Outcomes(metrics, setting.clock)
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=(Door(gate, outcomes, setting.clock),))
    loop = asyncio.get_running_loop()
    lending = Lending(registry, Handover(loop), loop) if setting.lends else None
    service = Service(registry, setting.clock.wall())
    front = GrpcFront(service, gate, outcomes, setting.clock, setting.front, lending=lending)
    health = Health(registry, setting.authenticator)
    server.add_generic_rpc_handlers((front.handler(),))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    add_reflection(server, Config(), (SERVICE.full_name,))
    port = server.add_insecure_port(f"127.0.0.1:{setting.port}")
    await server.start()
    return server, front, health, port, lending


async def _close(lending: Lending) -> None:
    lending.close()


def spec(name: str = "notes", **changes: object) -> pb.MemorySpec:
    """A small memory: 4 wide, 8 rows, 4 sequences."""
    made = pb.MemorySpec(name=name, dim=4, capacity=8, max_sequences=4, dtype=pb.DATA_TYPE_FP32)
    made.MergeFrom(pb.MemorySpec(**changes))  # type: ignore[arg-type]
    return made


def tensor(values: torch.Tensor) -> pb.Tensor:
    """A float32 tensor in a message."""
    data = values.to(torch.float32).contiguous().numpy().tobytes()
    return pb.Tensor(dtype=pb.DATA_TYPE_FP32, shape=values.shape, data=data)


def step(sequences: Sequence[str] = ("a",), *, rows: int = 1, seq: int = 0, **changes: object) -> pb.StepRequest:
    """A step of `notes` that retrieves the two nearest and appends, numbered by writer "w"."""
    parts = [pb.SequencePart(sequence=name, num_rows=rows, seq=seq) for name in sequences]
    keys = torch.arange(len(sequences) * rows * 4).reshape(1, -1, 4) + 10 * seq
    fields: dict[str, object] = {
        "memory": "notes",
        "sequences": parts,
        "retrieve": pb.RetrieveOptions(top_k=2, arrays=["key"]),
        "append": True,
        "writer": "w",
        "keys": tensor(keys),
    }
    return pb.StepRequest(**{**fields, **changes})  # type: ignore[arg-type]
