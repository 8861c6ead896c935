"""gRPC status or stream failure -> the client's error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.rpc import error_details_pb2
from grpc_status import rpc_status

from model_client.errors import MemstoreClientError, from_failure

if TYPE_CHECKING:
    import grpc
    from google.protobuf.duration_pb2 import Duration

    from memstore.v1 import memstore_pb2 as pb

DOMAIN = "memstore"


def from_call(call: grpc.Call) -> MemstoreClientError:
    """The error that ended a call."""
    reason, retry_after_s, metadata = "", None, {}
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the details belong to another status: a proxy has changed it
        status = None
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(retry):
            retry_after_s = _seconds(retry.retry_delay)
    return from_failure(code_of(call), reason, call.details() or "", metadata, retry_after_s)


def from_stream(failure: pb.Failure) -> MemstoreClientError:
    """The error of one step of a stream."""
    retry_after_s = _seconds(failure.retry_delay) if failure.HasField("retry_delay") else None
    return from_failure(failure.code, failure.reason, failure.message, dict(failure.metadata), retry_after_s)


def code_of(call: grpc.Call) -> int:
    """The number of the status code that ended a call."""
    code: tuple[int, str] = call.code().value
    return code[0]


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9
