"""Health and reflection over a real gRPC server."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from memstore.auth import Open
from memstore.errors import NotReady
from memstore.grpc_front import SERVICE
from memstore.health import Health
from memstore.registry import State
from memstore.v1 import memstore_pb2 as pb
from tests.calling import awaiting_next, fails
from tests.serving import Serving, serving, spec, step

HEALTH = health_pb2.HealthCheckResponse


def test_health_says_how_things_are() -> None:
    with serving(loads=False) as server:
        health = health_pb2_grpc.HealthStub(server.channel)

        def check(service: str) -> int:
            return int(health.Check(health_pb2.HealthCheckRequest(service=service)).status)

        watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
        missing = health.Watch(health_pb2.HealthCheckRequest(service="memory/notes"))
        assert next(watch).status == HEALTH.NOT_SERVING
        assert next(missing).status == HEALTH.SERVICE_UNKNOWN
        assert check(SERVICE.full_name) == HEALTH.NOT_SERVING
        assert isinstance(fails(server, "Step", step()), NotReady)
        server.registry.load().result()
        assert next(watch).status == HEALTH.SERVING
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()))
        assert next(missing).status == HEALTH.SERVING
        assert check("memory/notes") == check("") == HEALTH.SERVING
        for service in ("memory/none", "memory/", "notes", "grpc.health.v1.Health"):
            with pytest.raises(grpc.RpcError) as caught:
                check(service)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with awaiting_next(watch) as last_word:
            server.drain()
            assert last_word.result().status == HEALTH.NOT_SERVING
        assert check("memory/notes") == HEALTH.NOT_SERVING


class DrainingContext:
    """A call in which the server begins to drain while its first answer is on its way."""

    def __init__(self, registry: SimpleNamespace) -> None:
        self._registry = registry
        self.told: list[int] = []

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def write(self, answer: health_pb2.HealthCheckResponse) -> None:
        self.told.append(answer.status)
        if self._registry.state is State.SERVING:
            self._registry.state = State.DRAINING
            self._registry.on_change()


def test_who_watches_hears_of_a_drain_that_began_while_it_was_told_something_else() -> None:
    async def told() -> list[int]:
        registry = SimpleNamespace(state=State.SERVING, worker=SimpleNamespace(is_sick=False))
        health, context = Health(registry, Open()), DrainingContext(registry)  # type: ignore[arg-type]
        await health.Watch(health_pb2.HealthCheckRequest(), context)  # type: ignore[arg-type]
        return context.told

    assert asyncio.run(told()) == [HEALTH.SERVING, HEALTH.NOT_SERVING]


def test_a_sick_device_is_not_healthy(server: Serving) -> None:
    def fail(*_: object) -> object:
        raise torch.AcceleratorError("CUDA error")

    server.registry.find("default", "notes").engine.step = fail  # type: ignore[method-assign, assignment]
    fails(server, "Step", step())
    health = health_pb2_grpc.HealthStub(server.channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == HEALTH.NOT_SERVING
    assert isinstance(fails(server, "Step", step()), NotReady)


def test_reflection_lists_the_service(shared: Serving) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(shared.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = list(stub.ServerReflectionInfo(iter([request])))
    assert SERVICE.full_name in [service.name for service in answer.list_services_response.service]


@pytest.mark.parametrize(
    "path",
    [
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
@pytest.mark.parametrize(
    "content", [b"\x0a\x80\x10" + b"x" * 2048, b"\x0a\x00\x7a\x80\x10" + b"x" * 2048], ids=["name", "unknown"]
)
def test_nobody_has_a_large_message_kept_by_asking_for_health(shared: Serving, path: str, content: bytes) -> None:
    """No credential is needed for it, and a watch is open for as long as its caller likes."""
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = shared.channel.stream_stream(path)
    with pytest.raises(grpc.RpcError) as caught:
        next(call(iter([content]), timeout=15))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
