"""Embedded: the server's own service inside the caller's process, without a network and without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memstore.admission import Admission, CapacityBudget, QueueLimits
from memstore.capacity import capacity_of
from memstore.catalog import NoCatalog
from memstore.device import DeviceWorker, device_of
from memstore.expirer import Expirer
from memstore.plane import ProcessPlane
from memstore.registry import Registry
from memstore.seams import SystemClock
from memstore.service import Caller, Service

if TYPE_CHECKING:
    from concurrent.futures import Future

    from google.protobuf.message import Message

TENANT = "default"


class Embedded:
    """A server of one process: its memories end with it. Thread safe.

    `plane` makes the tensors of requests and reads those of replies. A reply whose tensors are not wanted any more is
    given to `plane.discard`.
    """

    def __init__(self, device: str = "cpu", *, capacity_bytes: int = 0, max_memories: int = 1024) -> None:
        """capacity_bytes: what memories may reserve; 0 for a share of what is free now. ConfigError: no such device."""
        self.plane = ProcessPlane()
        self._clock = SystemClock()
        target = device_of(device)
        self._worker = DeviceWorker(target, Admission(QueueLimits()), self._clock)
        budget = CapacityBudget(capacity_bytes or capacity_of(target))
        self._registry = Registry(NoCatalog(), self._worker, budget, self._clock, max_memories)
        self._registry.load().result()
        self._expirer = Expirer(self._registry)
        self._service = Service(self._registry, self._clock.wall())

    def call(self, method: str, request: Message, timeout_s: float | None = None) -> Future[Message]:
        """The answer to a call of the wire contract, such as "Step"; a failure is a MemstoreError in the future.

        timeout_s: the device does not begin what is older than this. The future itself does not time out.
        """
        deadline = None if timeout_s is None else self._clock.monotonic() + timeout_s
        return self._service.call(method, request, Caller(tenant=TENANT, plane=self.plane, deadline=deadline))

    def close(self) -> None:
        """Answers what is queued, then frees every memory. May be called twice."""
        self._expirer.close()
        self._registry.close()
        self._worker.close()
