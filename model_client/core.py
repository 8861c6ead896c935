"""The core: calls as generators that do no waiting themselves, and the two drivers that wait for them.

A Flow yields effects: Wait (for the answer to a call under way) and Pause. `drive` performs them by blocking,
`drive_async` by awaiting; everything else a client does is in the flows, once.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, TypeVar

from google.protobuf.message import Message

from model_client.errors import (
    Busy,
    CircuitOpen,
    ClientClosed,
    Expired,
    Internal,
    Late,
    MemstoreClientError,
    NotReady,
    Overloaded,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from model_client.breaker import Breaker
    from model_client.seams import Clock
    from model_client.stats import ClientStats
    from model_client.transport.base import Transport

T = TypeVar("T")
M = TypeVar("M", bound=Message)

FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 1.0


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for `future` until the monotonic time `until`; not there by then is Late."""

    future: Future[Message]
    until: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Let `seconds` pass."""

    seconds: float


Effect: TypeAlias = Wait | Pause
Flow: TypeAlias = Generator[Effect, Message | None, T]


class Exchange(Protocol):
    """A request that can be sent more than once, and remembers what that may have done."""

    def submit(self, timeout_s: float) -> Future[Message]:
        """Sends the request, or gives the future of the sending that is still under way."""
        ...

    def note(self, future: Future[Message], error: MemstoreClientError) -> bool:
        """Takes note of an attempt's failure; False forbids another attempt after it."""
        ...


class Running(Generic[T]):
    """A flow that has been begun. `effect` is what it waits for; None once it has ended."""

    def __init__(self, flow: Flow[T]) -> None:
        self.effect: Effect | None = None
        self._flow = flow
        self._value: list[T] = []
        self._error: MemstoreClientError | None = None
        self._advance(lambda: next(flow))

    def take(self) -> None:
        """Goes on after the wait or the pause: with the answer, its error, or Late where there is none."""
        effect = self.effect
        if isinstance(effect, Pause):
            self._advance(lambda: self._flow.send(None))
        elif isinstance(effect, Wait):
            self._take_answer(effect.future)

    def poll(self) -> bool:
        """Goes on as far as answers are there; True once the flow has ended."""
        while isinstance(self.effect, Wait) and self.effect.future.done():
            self.take()
        return self.effect is None

    def outcome(self) -> T:
        """What the ended flow returned, or raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._value[0]

    def _take_answer(self, future: Future[Message]) -> None:
        if not future.done():
            self._advance(lambda: self._flow.throw(Late("no answer before the deadline")))
        elif (error := future.exception()) is not None:
            known = error if isinstance(error, MemstoreClientError) else Internal(repr(error))
            self._advance(lambda: self._flow.throw(known))
        else:
            self._advance(lambda: self._flow.send(future.result()))

    def _advance(self, step: Callable[[], Effect]) -> None:
        try:
            self.effect = step()
        except StopIteration as stop:
            self.effect = None
            self._value.append(stop.value)
        except MemstoreClientError as error:
            self.effect = None
            self._error = error


def drive(running: Running[T], clock: Clock, limit: float = float("inf")) -> T:
    """Runs a flow to its end, blocking; what it waits for at the monotonic time `limit` is Late."""
    while (effect := running.effect) is not None:
        if isinstance(effect, Pause):
            clock.pause(effect.seconds)
        elif not effect.future.done():
            clock.wait(effect.future, max(0.0, min(effect.until, limit) - clock.monotonic()))
        running.take()
    return running.outcome()


async def drive_async(running: Running[T], clock: Clock, limit: float = float("inf")) -> T:
    """Runs a flow to its end, awaiting; what it waits for at the monotonic time `limit` is Late."""
    while (effect := running.effect) is not None:
        if isinstance(effect, Pause):
            await clock.pause_async(effect.seconds)
        elif not effect.future.done():
            await clock.wait_async(effect.future, max(0.0, min(effect.until, limit) - clock.monotonic()))
        running.take()
    return running.outcome()


class OneCall:
    """One request of any call. `is_repeatable`: may be sent again when it may be done already."""

    def __init__(self, transport: Transport, method: str, request: Message, is_repeatable: bool = True) -> None:
        self._transport = transport
        self._method = method
        self._request = request
        self._is_repeatable = is_repeatable

    def submit(self, timeout_s: float) -> Future[Message]:
        """Sends the request."""
        return self._transport.call(self._method, self._request, timeout_s)

    def note(self, future: Future[Message], error: MemstoreClientError) -> bool:
        """True unless the call may have been done and must not be done twice."""
        return self._is_repeatable or not error.is_outcome_unknown


class Core:
    """What the calls of one client share: the transport, the breaker and the counters."""

    def __init__(
        self, transport: Transport, breaker: Breaker, stats: ClientStats, clock: Clock, owner: Core | None = None
    ) -> None:
        """owner: the core of the client, for that of a session of its own, which keeps it alive."""
        self._owner = owner
        self.transport = transport
        self.breaker = breaker
        self.stats = stats
        self.clock = clock

    def call(
        self, method: str, request: Message, reply: type[M], timeout_s: float, is_repeatable: bool = True
    ) -> Flow[M]:
        """One call of the contract with its retries."""
        exchange = OneCall(self.transport, method, request, is_repeatable)
        answer = yield from self.guarded(self.attempts(exchange, self.clock.monotonic() + timeout_s))
        return expect(answer, reply)

    def guarded(self, flow: Flow[T]) -> Flow[T]:
        """Runs `flow` if the breaker lets it, counts it, and tells the breaker how it ended."""
        self.stats.add("calls")
        try:
            self.breaker.check()
        except CircuitOpen:
            self.stats.add("skipped")
            self.stats.add("failures")
            raise
        try:
            value = yield from flow
        except MemstoreClientError as error:
            self.stats.add("failures")
            if isinstance(error, Late | Expired):
                self.stats.add("late")
            if not isinstance(error, Busy | ClientClosed):  # these say nothing about the server
                self.breaker.record(not _counts_against_server(error))
            raise
        self.breaker.record(True)
        return value

    def attempts(self, exchange: Exchange, until: float) -> Flow[Message]:
        """Sends until there is an answer other than "not now", or until waiting would outlast the deadline.

        NotReady and Unavailable are tried again with growing pauses, Overloaded once, after the delay it asks for.
        """
        backoff_s = FIRST_BACKOFF_S
        may_wait_out = True
        while True:
            future = exchange.submit(max(0.0, until - self.clock.monotonic()))
            try:
                answer = yield Wait(future, until)
                return expect(answer, Message)
            except (NotReady, Unavailable, Overloaded) as error:
                is_refused = not exchange.note(future, error)
                delay_s = error.retry_after_s or 0.0
                if isinstance(error, Overloaded):
                    is_refused |= not may_wait_out or error.retry_after_s is None
                    may_wait_out = False
                else:
                    delay_s = max(delay_s, backoff_s)
                    backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)
                if is_refused or self.clock.monotonic() + delay_s >= until:
                    raise
            except MemstoreClientError as error:
                exchange.note(future, error)
                raise
            self.stats.add("retries")
            yield Pause(delay_s)


def expect(answer: Message | None, kind: type[M]) -> M:
    """The answer, which must be of this kind."""
    if not isinstance(answer, kind):
        raise Internal(f"{kind.__name__} expected, {type(answer).__name__} received")
    return answer


def _counts_against_server(error: MemstoreClientError) -> bool:
    return isinstance(error, Unavailable | NotReady | Late | Expired | Overloaded | Internal)
