"""Outcomes: how calls over gRPC ended, counted and, where it was a bug, logged; and the way a failure is sent."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from grpc_status import rpc_status

from memstore import status
from memstore.arrival import REQUEST_ID
from memstore.errors import MemstoreError
from memstore.logs import trouble

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import grpc

    from memstore.arrival import Context
    from memstore.metrics import Metrics
    from memstore.seams import Clock

_log = logging.getLogger(__name__)


class Outcomes:
    """Takes note of how calls ended. Used by one thread."""

    def __init__(self, metrics: Metrics, clock: Clock) -> None:
        self._metrics = metrics
        self._clock = clock

    def stream(self) -> AbstractContextManager[None]:
        """Counts a stream for as long as it is open."""
        return self._metrics.stream()

    def count(self, method: str, code: grpc.StatusCode, began: float) -> None:
        """A call of a method, or a step of a stream, has ended. began: monotonic seconds."""
        self._metrics.rpc(method, code.name, self._clock.monotonic() - began)

    def failure(self, method: str, error: Exception, request_id: str, began: float) -> status.Answer:
        """What the caller is told of an error, which is counted; one that is a bug is logged."""
        if not isinstance(error, MemstoreError):
            trouble(_log, "call failed", error, method=method, request_id=request_id)
        answer = status.answer(error, request_id)
        self.count(method, answer.code, began)
        return answer


async def abort(context: Context, failure: status.Answer, request_id: str) -> None:
    """Ends a call with a failure. Raises, as gRPC wants it."""
    rich = rpc_status.to_status(status.to_status(failure, request_id))
    await context.abort(rich.code, rich.details, (*rich.trailing_metadata, (REQUEST_ID, request_id)))
