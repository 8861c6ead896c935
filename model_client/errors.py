"""The errors a memory client raises: one class a reason, the reason being the class name as it travels.

MemstoreClientError
    InvalidRequest NotFound AlreadyExists SequenceGap EpochChanged PositionExpired NotAuthenticated NotAllowed
    Overloaded QuotaExceeded DeviceMemoryFull ReadOnly NotReady Expired Corrupt        the server answered so
    Internal        the server failed in a way it has no name for
    Unavailable     the connection failed: whether the call was done is not known
    Late            no answer before the deadline: whether the call was done is not known
    CircuitOpen     too many failures in a row; the network was not touched
    Busy            the session has as many steps under way as it may; the network was not touched
    ClientClosed    the client was closed before or during the call
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class MemstoreClientError(Exception):
    """Base of all.

    reason: UPPER_SNAKE of the class name. metadata: what the server gave to go on with, as text.
    retry_after_s: how long to wait before another try, in seconds; None where waiting does not help.
    is_outcome_unknown: True where the call may or may not have been done.
    """

    is_outcome_unknown = False

    def __init__(
        self, message: str, *, metadata: Mapping[str, str] | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s

    @property
    def reason(self) -> str:
        """The reason as it stands on the wire, such as "EPOCH_CHANGED"."""
        return reason_of(type(self))


class InvalidRequest(MemstoreClientError):
    """The input breaks the contract; the message names the field and the limit."""


class NotFound(MemstoreClientError):
    """Nothing of that name."""


class AlreadyExists(MemstoreClientError):
    """The name, or the seq, is taken by something else."""


class SequenceGap(MemstoreClientError):
    """An earlier append never arrived; metadata: sequence, expected_seq."""


class EpochChanged(MemstoreClientError):
    """The sequence was reset or lost; metadata: sequence, epoch (0: it does not exist)."""


class PositionExpired(MemstoreClientError):
    """A position or seq outside of what the server keeps."""


class NotAuthenticated(MemstoreClientError):
    """No credential, or a wrong one."""


class NotAllowed(MemstoreClientError):
    """The credential is good, but not for this."""


class Overloaded(MemstoreClientError):
    """Too much at once; carries retry_after_s."""


class QuotaExceeded(MemstoreClientError):
    """A bound that waiting does not lift."""


class DeviceMemoryFull(MemstoreClientError):
    """The device has no room for what the call would reserve."""


class ReadOnly(MemstoreClientError):
    """The log of a durable memory cannot be written; or it was, and not synced. The same seq can be sent again."""

    is_outcome_unknown = True


class NotReady(MemstoreClientError):
    """The server is starting or draining; nothing was done."""


class Expired(MemstoreClientError):
    """The server saw the deadline pass; what the device had begun by then is done nevertheless."""

    is_outcome_unknown = True


class Corrupt(MemstoreClientError):
    """Stored state fails its check."""


class Internal(MemstoreClientError):
    """The server failed; its log has the rest."""

    is_outcome_unknown = True


class Unavailable(MemstoreClientError):
    """The connection failed."""

    is_outcome_unknown = True


class Late(MemstoreClientError):
    """No answer before the deadline."""

    is_outcome_unknown = True


class CircuitOpen(MemstoreClientError):
    """Recent calls failed in a row, so this one was not tried; carries retry_after_s."""


class Busy(MemstoreClientError):
    """Steps of this session must be awaited before another is begun."""


class ClientClosed(MemstoreClientError):
    """The client is closed."""

    is_outcome_unknown = True


def reason_of(error: type[MemstoreClientError]) -> str:
    """The reason of an error class as it stands on the wire: EpochChanged -> "EPOCH_CHANGED"."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", error.__name__).upper()


BY_REASON = {reason_of(error): error for error in MemstoreClientError.__subclasses__()}
"""Reason on the wire -> class."""

_BY_NAME = {error.__name__: error for error in MemstoreClientError.__subclasses__()}

_BY_CODE: Mapping[int, type[MemstoreClientError]] = {
    1: Unavailable,
    3: InvalidRequest,
    4: Late,
    5: NotFound,
    6: AlreadyExists,
    7: NotAllowed,
    8: Overloaded,
    11: PositionExpired,
    14: Unavailable,
    15: Corrupt,
    16: NotAuthenticated,
}
"""gRPC status code -> class, for answers without a reason: those that proxies and the gRPC library give themselves."""


def from_failure(
    code: int, reason: str, message: str, metadata: Mapping[str, str], retry_after_s: float | None
) -> MemstoreClientError:
    """The error that a status code and a reason stand for; Internal where neither is known."""
    error = BY_REASON.get(reason) or _BY_CODE.get(code, Internal)
    return error(message, metadata=metadata, retry_after_s=retry_after_s)


def from_class_name(
    name: str, message: str, metadata: Mapping[str, str], retry_after_s: float | None
) -> MemstoreClientError:
    """The error of the same name as one of the server's; Internal where there is none."""
    error = _BY_NAME.get(name, Internal)
    return error(message, metadata=metadata, retry_after_s=retry_after_s)
