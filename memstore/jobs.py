"""Jobs: requests on their way through the device's thread, and what it needs to know of them."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memstore.errors import MemstoreError
    from memstore.types import Hits, SequenceResult, StepBatch, StepResult

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Settling(Protocol):
    """What says when an answer may leave."""

    def settle(self, answer: Callable[[MemstoreError | None], None]) -> None:
        """See Memory.settle."""


class Engine(Settling, Protocol):
    """What the worker needs of a memory."""

    def step(
        self, batches: Sequence[StepBatch], carry: Callable[[int, Hits], None]
    ) -> list[StepResult | MemstoreError]:
        """See Memory.step."""


class Reply(Protocol[T_co]):
    """The answer to one step, made in two halves."""

    def carry(self, hits: Hits) -> None:
        """Takes in what was retrieved, while nothing is changed yet; may raise."""

    def finish(self, sequences: Sequence[SequenceResult]) -> T_co:
        """The whole answer, after the change."""

    def discard(self) -> None:
        """Lets go of what was taken in; the answer is not sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Whose request it is, how heavy, and until when (in the clock's monotonic seconds) its answer is wanted."""

    tenant: str
    num_bytes: int
    deadline: float | None
    request_id: str


class Job(Generic[T]):
    """A request for the device thread: its ticket and the future of its answer."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.future: Future[T] = Future()


class CallJob(Job[T]):
    """Anything that must run in the device thread by itself. Steps before it are done first, steps after it later.

    engine: what it changes or shows, which says when the answer may leave; None where that is at once.
    """

    def __init__(self, ticket: Ticket, run: Callable[[], T], engine: Settling | None = None) -> None:
        super().__init__(ticket)
        self.run = run
        self.engine = engine


class StepJob(Job[T]):
    """A step of one memory. `decode` and `reply` are called in the device thread."""

    def __init__(
        self,
        ticket: Ticket,
        memory: str,
        engine: Engine,
        decode: Callable[[], StepBatch],
        reply: Reply[T],
    ) -> None:
        super().__init__(ticket)
        self.memory = memory
        self.engine = engine
        self.decode = decode
        self.reply = reply
