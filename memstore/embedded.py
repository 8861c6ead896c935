"""Embedded: the server's own service inside the caller's process, without a network and without a copy."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from memstore.admission import Admission, CapacityBudget, QueueLimits
from memstore.capacity import capacity_of
from memstore.catalog import NoCatalog
from memstore.device import DeviceWorker, device_of
from memstore.errors import MemstoreError
from memstore.expirer import Expirer
from memstore.plane import ProcessPlane
from memstore.registry import Registry
from memstore.seams import SystemClock
from memstore.service import Caller, Service, stand_job

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from memstore.standing import Standing
    from memstore.v1 import memstore_pb2 as pb

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

    def stand(self, request: pb.StepRequest, timeout_s: float) -> Future[Standing | None]:
        """A step that only retrieves, to be run again and again by the caller; None where that cannot be.

        The future fails as that of `call`.
        """
        caller = Caller(tenant=TENANT, plane=self.plane, deadline=self._clock.monotonic() + timeout_s)
        future: Future[Standing | None]
        try:
            engine = self._registry.find(TENANT, request.memory).engine
            future = self._worker.submit(stand_job(request, caller, engine, self._worker.guests))
        except MemstoreError as error:
            future = Future()
            future.set_exception(error)
        future.add_done_callback(lambda _: self.plane.discard(request))
        return future

    def close(self) -> None:
        """Answers what is queued, then frees every memory. May be called twice."""
        self._expirer.close()
        self._registry.close()
        self._worker.close()
