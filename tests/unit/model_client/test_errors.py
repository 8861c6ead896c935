"""The client's errors: one for every reason the server can give, and for statuses that come without one."""

from __future__ import annotations

import pytest

import memstore.errors as server_errors
from memstore import status as server_status
from model_client import errors
from model_client.transport import status

SERVER_ERRORS = server_errors.MemstoreError.__subclasses__()


def instance(kind: type[server_errors.MemstoreError]) -> server_errors.MemstoreError:
    error = kind.__new__(kind)
    server_errors.MemstoreError.__init__(error, "the message", sequence="a", expected_seq=3, epoch=9)
    if isinstance(error, server_errors.Overloaded | server_errors.NotReady):
        error.retry_delay_s = 0.25
    return error


@pytest.mark.parametrize("kind", SERVER_ERRORS, ids=lambda kind: kind.__name__)
def test_every_server_error_has_a_class_of_its_name(kind: type[server_errors.MemstoreError]) -> None:
    failure = server_status.to_failure(server_status.answer(instance(kind), "r1"))
    error = status.from_stream(failure)
    assert type(error).__name__ == kind.__name__
    assert error.reason == failure.reason
    assert error.metadata == {"sequence": "a", "expected_seq": "3", "epoch": "9"}
    assert error.retry_after_s == (
        failure.retry_delay.ToNanoseconds() / 1e9 if failure.HasField("retry_delay") else None
    )
    by_name = errors.from_class_name(kind.__name__, "m", {}, None)
    assert type(by_name) is type(error)


@pytest.mark.parametrize(
    ("code", "kind"),
    [(1, errors.Unavailable), (2, errors.Internal), (4, errors.Late), (8, errors.Overloaded), (12, errors.Internal)],
)
def test_a_status_without_a_reason_is_read_by_its_code(code: int, kind: type[errors.MemstoreClientError]) -> None:
    assert type(errors.from_failure(code, "", "m", {}, None)) is kind


def test_what_may_have_been_done_is_not_known_where_no_answer_came() -> None:
    unknown = {each.__name__ for each in errors.MemstoreClientError.__subclasses__() if each.is_outcome_unknown}
    assert unknown == {"Internal", "ReadOnly", "Unavailable", "Late", "Expired", "ClientClosed"}
