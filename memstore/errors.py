"""Every error that memstore can raise. The gRPC status of each stands in status.py.

MemstoreError
    InvalidRequest      a field is missing, malformed or beyond its limit
    NotFound            no such memory, no such sequence to fork
    AlreadyExists       the name is taken; a seq was used with other rows
    SequenceGap         carries expected_seq
    EpochChanged        carries the new epoch
    PositionExpired     a position or seq that has left, or lies beyond what is published
    NotAuthenticated    no credential, or a wrong one
    NotAllowed          the credential does not reach this far
    Overloaded          carries retry_delay_s
    QuotaExceeded       a bound that waiting does not lift
    DeviceMemoryFull    the device has no room for what a memory would reserve
    ReadOnly            the memory's log cannot be written: it is read as before, and takes no change
    NotReady            starting, draining, catalogue gone, a sequence lent to another process
    Expired             the deadline passed; nothing was done, but for a step of a stream that had begun
    Corrupt             a stored catalogue, log or snapshot fails its check
    Internal            a bug: carries the request_id under which the server's log has the text
"""

from __future__ import annotations


class MemstoreError(Exception):
    """Base of all. `metadata` travels to the client as text and names what it needs to go on."""

    def __init__(self, message: str, **metadata: int | str) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items()}


class InvalidRequest(MemstoreError):
    """The caller's input breaks the contract; the message names the field and the limit."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}", field=field)


class NotFound(MemstoreError):
    """Nothing of that name."""


class AlreadyExists(MemstoreError):
    """The name, or the seq, is taken by something else."""


class SequenceGap(MemstoreError):
    """A seq beyond the next one: an append before it never arrived. Resend from `expected_seq`."""

    def __init__(self, sequence: str, seq: int, expected_seq: int) -> None:
        message = f"sequences[{sequence!r}].seq: {seq} given, {expected_seq} expected"
        super().__init__(message, sequence=sequence, expected_seq=expected_seq)


class EpochChanged(MemstoreError):
    """The sequence was reset, or its rows were lost: forget its positions and begin again at seq 0."""

    def __init__(self, sequence: str, given: int, epoch: int) -> None:
        message = f"sequences[{sequence!r}].epoch: {given} given, the epoch is {epoch} (0: the sequence does not exist)"
        super().__init__(message, sequence=sequence, epoch=epoch)


class PositionExpired(MemstoreError):
    """A position or seq outside of what is kept."""


class NotAuthenticated(MemstoreError):
    """No credential, or a wrong one."""


class NotAllowed(MemstoreError):
    """The credential is good, but not for this."""


class Overloaded(MemstoreError):
    """Too much at once; worth another try after `retry_delay_s`."""

    def __init__(self, message: str, retry_delay_s: float) -> None:
        super().__init__(message)
        self.retry_delay_s = retry_delay_s


class QuotaExceeded(MemstoreError):
    """A bound is reached that waiting does not lift."""


class DeviceMemoryFull(MemstoreError):
    """The device has no room for this; nothing was changed."""


class ReadOnly(MemstoreError):
    """The log of a durable memory cannot be written. The memory goes on being read; somebody must see to the disk."""


class NotReady(MemstoreError):
    """The server is starting or draining, its catalogue is out of reach, or a lent sequence was asked back.

    Worth another try after `retry_delay_s`.
    """

    def __init__(self, message: str, retry_delay_s: float = 0.5) -> None:
        super().__init__(message)
        self.retry_delay_s = retry_delay_s


class Expired(MemstoreError):
    """The deadline passed. Nothing was done, unless the step of a stream had been begun by the device."""


class Corrupt(MemstoreError):
    """Stored state fails its check."""


class Internal(MemstoreError):
    """A bug of the server's. Its text stays in the server's log, under the request's id."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"internal error; the server's log has it under request {request_id}", request_id=request_id)
