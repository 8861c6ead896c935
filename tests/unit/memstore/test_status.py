"""status: every error has its place in the table, and every answer maps back."""

from __future__ import annotations

import inspect

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from memstore import errors, status
from memstore.v1 import memstore_pb2 as pb

KINDS = {
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.MemstoreError) and kind is not errors.MemstoreError
}
EXAMPLES: list[tuple[errors.MemstoreError, grpc.StatusCode, str]] = [
    (errors.InvalidRequest("keys.shape", "too wide"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (errors.NotFound("none", memory="m"), grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    (errors.AlreadyExists("taken"), grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"),
    (errors.SequenceGap("a", 5, 3), grpc.StatusCode.FAILED_PRECONDITION, "SEQUENCE_GAP"),
    (errors.EpochChanged("a", 5, 2**63 - 1), grpc.StatusCode.FAILED_PRECONDITION, "EPOCH_CHANGED"),
    (errors.PositionExpired("gone"), grpc.StatusCode.OUT_OF_RANGE, "POSITION_EXPIRED"),
    (errors.NotAuthenticated("who"), grpc.StatusCode.UNAUTHENTICATED, "NOT_AUTHENTICATED"),
    (errors.NotAllowed("no"), grpc.StatusCode.PERMISSION_DENIED, "NOT_ALLOWED"),
    (errors.Overloaded("full", 0.25), grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    (errors.QuotaExceeded("enough"), grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
    (errors.DeviceMemoryFull("full"), grpc.StatusCode.RESOURCE_EXHAUSTED, "DEVICE_MEMORY_FULL"),
    (errors.ReadOnly("disk full"), grpc.StatusCode.FAILED_PRECONDITION, "READ_ONLY"),
    (errors.NotReady("soon"), grpc.StatusCode.UNAVAILABLE, "NOT_READY"),
    (errors.Expired("late"), grpc.StatusCode.DEADLINE_EXCEEDED, "EXPIRED"),
    (errors.Corrupt("torn"), grpc.StatusCode.DATA_LOSS, "CORRUPT"),
    (errors.Internal("r1"), grpc.StatusCode.INTERNAL, "INTERNAL"),
]
IDS = [type(error).__name__ for error, _, _ in EXAMPLES]


def test_every_error_is_in_the_table() -> None:
    assert {type(error) for error, _, _ in EXAMPLES} == KINDS


@pytest.mark.parametrize(("error", "code", "reason"), EXAMPLES, ids=IDS)
def test_an_error_comes_back_from_a_unary_call(error: errors.MemstoreError, code: grpc.StatusCode, reason: str) -> None:
    reply = status.answer(error, "r1")
    assert (reply.code, reply.reason) == (code, reason)
    sent = status.to_status(reply, "r1").SerializeToString()
    assert len(sent) < 4096
    _assert_same(status.error_of(status.from_status(status_pb2.Status.FromString(sent))), error)


@pytest.mark.parametrize(("error", "code", "reason"), EXAMPLES, ids=IDS)
def test_an_error_comes_back_from_a_stream(error: errors.MemstoreError, code: grpc.StatusCode, reason: str) -> None:
    failure = status.to_failure(status.answer(error, "r1"))
    assert (failure.code, failure.reason) == (code.value[0], reason)
    _assert_same(status.error_of(status.from_failure(failure)), error)


def _assert_same(got: errors.MemstoreError | None, error: errors.MemstoreError) -> None:
    assert type(got) is type(error)
    assert (got.message, got.metadata) == (error.message, error.metadata)
    assert str(got) == str(error)
    if isinstance(error, errors.Overloaded):
        assert isinstance(got, errors.Overloaded)
        assert got.retry_delay_s == error.retry_delay_s


def test_what_is_not_ours_says_nothing_but_its_request() -> None:
    reply = status.answer(ValueError("/etc/passwd"), "r77")
    assert reply.code is grpc.StatusCode.INTERNAL
    assert "passwd" not in str(status.to_status(reply, "r77"))
    assert reply.metadata == {"request_id": "r77"}


def test_a_message_is_cut_where_headers_would_not_carry_it() -> None:
    reply = status.answer(errors.InvalidRequest("keys.shape", "1, " * 10_000), "r1")
    assert reply.message.startswith("keys.shape: 1, 1")
    assert reply.message.endswith("...")
    assert len(status.to_status(reply, "r1").SerializeToString()) < 4096


def test_a_subclass_answers_as_its_base() -> None:
    class Narrower(errors.NotFound):
        """A kind of NotFound."""

    assert status.answer(Narrower("none"), "r1").reason == "NOT_FOUND"


def test_details_name_field_delay_and_request() -> None:
    bad = status.to_status(status.answer(errors.InvalidRequest("retrieve.top_k", "too many"), "r1"), "r1")
    request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(request) for detail in bad.details)
    assert request.field_violations[0].field == "retrieve.top_k"
    busy = status.to_status(status.answer(errors.Overloaded("full", 0.25), "r1"), "r1")
    retry, info = error_details_pb2.RetryInfo(), error_details_pb2.RequestInfo()
    assert any(detail.Unpack(retry) for detail in busy.details)
    assert retry.retry_delay.ToMilliseconds() == 250
    assert any(detail.Unpack(info) for detail in busy.details)
    assert info.request_id == "r1"


def test_waiting_is_advised_only_where_it_helps() -> None:
    advised = {type(error) for error, _, _ in EXAMPLES if status.answer(error, "r1").retry_delay_s is not None}
    assert advised == {errors.Overloaded, errors.NotReady}


def test_an_answer_of_somebody_else_is_none_of_ours() -> None:
    foreign = status_pb2.Status(code=14, message="a proxy is down")
    assert status.error_of(status.from_status(foreign)) is None
    assert status.from_failure(pb.Failure(code=99)).code is grpc.StatusCode.UNKNOWN
