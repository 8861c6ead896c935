"""Error <-> gRPC status: one table, read both ways."""

from __future__ import annotations

import re
from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from memstore import errors
from memstore.v1 import memstore_pb2 as pb

DOMAIN = "memstore"
MAX_MESSAGE_CHARS = 1000
"""It travels up to three times in trailing metadata, of which HTTP/2 peers take 8 KiB."""
_CODES: dict[type[errors.MemstoreError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.SequenceGap: grpc.StatusCode.FAILED_PRECONDITION,
    errors.EpochChanged: grpc.StatusCode.FAILED_PRECONDITION,
    errors.PositionExpired: grpc.StatusCode.OUT_OF_RANGE,
    errors.NotAuthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.NotAllowed: grpc.StatusCode.PERMISSION_DENIED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeviceMemoryFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ReadOnly: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NotReady: grpc.StatusCode.UNAVAILABLE,
    errors.Expired: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Corrupt: grpc.StatusCode.DATA_LOSS,
    errors.Internal: grpc.StatusCode.INTERNAL,
}


def _reason_of(kind: type[errors.MemstoreError]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).upper()


_KINDS = {_reason_of(kind): kind for kind in _CODES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an error becomes on the wire, in a status as in a stream's Failure."""

    code: grpc.StatusCode
    reason: str
    message: str
    metadata: dict[str, str]
    retry_delay_s: float | None


def answer(error: BaseException, request_id: str) -> Answer:
    """The answer to an error. Anything that is not ours is Internal, and its text does not travel."""
    known = error if isinstance(error, errors.MemstoreError) else errors.Internal(request_id)
    kind = next(base for base in type(known).__mro__ if base in _CODES)
    delay = known.retry_delay_s if isinstance(known, errors.Overloaded | errors.NotReady) else None
    return Answer(
        code=_CODES[kind],
        reason=_reason_of(kind),
        message=_clipped(known.message),
        metadata=known.metadata,
        retry_delay_s=delay,
    )


def _clipped(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE_CHARS else f"{message[: MAX_MESSAGE_CHARS - 3]}..."


def error_of(reply: Answer) -> errors.MemstoreError | None:
    """The error that an answer was made from; None for an answer that is not memstore's."""
    kind = _KINDS.get(reply.reason)
    if kind is None:
        return None
    error = kind.__new__(kind)
    errors.MemstoreError.__init__(error, reply.message, **reply.metadata)
    if isinstance(error, errors.Overloaded | errors.NotReady):
        error.retry_delay_s = reply.retry_delay_s or 0.0
    return error


def to_failure(reply: Answer) -> pb.Failure:
    """The answer as a stream carries it."""
    failure = pb.Failure(code=reply.code.value[0], reason=reply.reason, message=reply.message, metadata=reply.metadata)
    if reply.retry_delay_s is not None:
        failure.retry_delay.CopyFrom(_duration(reply.retry_delay_s))
    return failure


def from_failure(failure: pb.Failure) -> Answer:
    """The answer that a stream carried."""
    has_delay = failure.HasField("retry_delay")
    return Answer(
        code=_code(failure.code),
        reason=failure.reason,
        message=failure.message,
        metadata=dict(failure.metadata),
        retry_delay_s=_seconds(failure.retry_delay) if has_delay else None,
    )


def to_status(reply: Answer, request_id: str) -> status_pb2.Status:
    """The answer as a unary call carries it, in grpc-status-details-bin."""
    details = [
        error_details_pb2.ErrorInfo(reason=reply.reason, domain=DOMAIN, metadata=reply.metadata),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if reply.retry_delay_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=_duration(reply.retry_delay_s)))
    if "field" in reply.metadata:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=reply.metadata["field"], description=reply.message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    status = status_pb2.Status(code=reply.code.value[0], message=reply.message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def from_status(status: status_pb2.Status) -> Answer:
    """The answer that a unary call carried."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    has_info = _unpack(status, info)
    has_delay = _unpack(status, retry)
    return Answer(
        code=_code(status.code),
        reason=info.reason if has_info and info.domain == DOMAIN else "",
        message=status.message,
        metadata=dict(info.metadata),
        retry_delay_s=_seconds(retry.retry_delay) if has_delay else None,
    )


def _unpack(status: status_pb2.Status, into: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> bool:
    return any(detail.Unpack(into) for detail in status.details)


def _code(number: int) -> grpc.StatusCode:
    return next((code for code in grpc.StatusCode if code.value[0] == number), grpc.StatusCode.UNKNOWN)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9
