"""Door: where calls are turned away before anything of their messages is read."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from memstore.access import SCOPES
from memstore.arrival import request_id_of, text_of
from memstore.auth import Credentials
from memstore.lobby import Lobby
from memstore.outcomes import abort
from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    from memstore.arrival import Context
    from memstore.gate import Gate
    from memstore.outcomes import Outcomes
    from memstore.seams import Clock
    from memstore.status import Answer

_METHODS = {
    path: path.rpartition("/")[2]
    for path in SCOPES
    for service in pb.DESCRIPTOR.services_by_name.values()
    if path.startswith(f"/{service.full_name}/")
}
OTHER = "other"
"""Under this name calls of methods are counted that are not of the contract."""


class Door(grpc.aio.ServerInterceptor):
    """Asks the gate about every call, whoever added its method to the server.

    gRPC asks here with the headers of a call, and takes of its message no more meanwhile than the other end may send
    unasked. So a stranger gets no message read, however large it is or slowly it comes; what everybody may call is read
    in the lobby.
    """

    def __init__(self, gate: Gate, outcomes: Outcomes, clock: Clock) -> None:
        self._gate = gate
        self._outcomes = outcomes
        self._clock = clock
        self._lobby = Lobby()

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """The handler of a method; one that refuses where the gate does."""
        path, metadata = handler_call_details.method, text_of(handler_call_details.invocation_metadata)
        began = self._clock.monotonic()
        try:
            self._gate.meet(path, Credentials.of(metadata))
        except Exception as error:  # the root of the servicer begins here: whatever it is, the caller gets a status
            request_id = request_id_of(metadata)
            failure = self._outcomes.failure(_METHODS.get(path, OTHER), error, request_id, began)
            return grpc.stream_stream_rpc_method_handler(partial(_refuse, failure, request_id))
        handler = await continuation(handler_call_details)
        return handler if handler is None or SCOPES[path] else self._lobby.handler(handler)


async def _refuse(failure: Answer, request_id: str, _: object, context: Context) -> None:
    await abort(context, failure, request_id)
