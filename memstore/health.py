"""Health: grpc.health.v1 that answers with the state of things: process, service, and each memory by `memory/NAME`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from memstore.access import Scope
from memstore.arrival import credentials_of, metadata_of
from memstore.auth import Credentials
from memstore.errors import NotAuthenticated
from memstore.registry import State
from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    from memstore.auth import Authenticator
    from memstore.registry import Registry

PROCESS = ""
NO_CREDENTIALS = Credentials()
SERVICE = pb.DESCRIPTOR.services_by_name["MemoryService"].full_name
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """Health of a registry. Needs no credential, but for that of a memory, which is shown to its tenant only."""

    def __init__(self, registry: Registry, authenticator: Authenticator) -> None:
        """Created on the event loop that serves it."""
        self._registry = registry
        self._authenticator = authenticator
        self._changed = asyncio.Condition()
        self._num_changes = 0
        self._loop = asyncio.get_running_loop()
        self._announcements: set[asyncio.Task[None]] = set()
        registry.on_change = self.changed

    @property
    def is_serving(self) -> bool:
        """True once every memory is loaded, while the device works, until draining begins."""
        return self._registry.state is State.SERVING and not self._registry.worker.is_sick

    def status(self, service: str, credentials: Credentials = NO_CREDENTIALS) -> int | None:
        """The status of a service by its name; None where there is none of that name, or the caller may not know."""
        if service in (PROCESS, SERVICE):
            return int(SERVING if self.is_serving else NOT_SERVING)
        kind, _, name = service.partition("/")
        if kind == "memory" and self._is_loaded(name, credentials):
            is_up = self._registry.state is not State.DRAINING and not self._registry.worker.is_sick
            return int(SERVING if is_up else NOT_SERVING)
        return None

    def _is_loaded(self, name: str, credentials: Credentials) -> bool:
        try:
            identity = self._authenticator.identify(credentials)
        except NotAuthenticated:
            return False
        return Scope.READ in identity.scopes and self._registry.is_loaded(identity.tenant, name)

    def changed(self) -> None:
        """Tells those who watch to look again. Any thread may call it."""
        self._loop.call_soon_threadsafe(self._announce_soon)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        """The status of one service; NOT_FOUND where there is none of that name."""
        found = self.status(request.service, self._credentials(context))
        if found is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=found)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """The status of one service now and whenever it changes, until draining; SERVICE_UNKNOWN if there is none."""
        last: int | None = None
        credentials = self._credentials(context)
        while True:
            seen, is_last = self._num_changes, self._registry.state is State.DRAINING
            found = self.status(request.service, credentials)
            status = int(UNKNOWN) if found is None else found
            if status != last:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                last = status
            if is_last:
                return  # it has heard the last word, and a stream that stays open would hold up the stop
            await self._changes_beyond(seen)

    def _credentials(self, context: grpc.aio.ServicerContext[Any, Any]) -> Credentials:
        return credentials_of(metadata_of(context), context, self._authenticator)

    def _announce_soon(self) -> None:
        task = asyncio.create_task(self._announce())
        self._announcements.add(task)
        task.add_done_callback(self._announcements.discard)

    async def _announce(self) -> None:
        async with self._changed:
            self._num_changes += 1
            self._changed.notify_all()

    async def _changes_beyond(self, seen: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._num_changes > seen)
