"""FaultyTransport: a network that loses, repeats, delays and reorders, before the real service. FakeClock: no time."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from memstore.embedded import TENANT
from memstore.errors import MemstoreError
from memstore.plane import InlinePlane as ServerPlane
from memstore.service import Caller
from model_client.errors import ClientClosed, Unavailable, from_class_name
from model_client.seams import Clock
from model_client.wire import InlinePlane

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from memstore.embedded import Embedded


class FakeClock(Clock):
    """Time passes only by waiting and pausing, and then at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        """Now."""
        return self.now

    def pause(self, seconds: float) -> None:
        """Time passes."""
        self.pauses.append(seconds)
        self.now += seconds

    async def pause_async(self, seconds: float) -> None:
        """Time passes."""
        self.pause(seconds)

    def wait(self, future: Future[Message], seconds: float) -> None:
        """Whatever is not there now will not be there in time."""
        if not future.done():
            self.now += seconds

    async def wait_async(self, future: Future[Message], seconds: float) -> None:
        """The same."""
        self.wait(future, seconds)


class Fault(Enum):
    """What befalls one call."""

    NONE = "none"
    REQUEST_LOST = "the request never arrives, and the connection is seen to break"
    REPLY_LOST = "it is done, and the connection breaks before the answer"
    SILENCE = "it is done, and the answer never comes"
    SWALLOWED = "it is not done, and no answer comes"
    TWICE = "it arrives twice"
    HELD = "it arrives later, in the order of `release`, and is answered then"
    FLOATING = "the connection is seen to break, and the request arrives later nevertheless"


@dataclass(frozen=True)
class Held:
    """A request on its way; `answer` is None where nobody waits for it."""

    method: str
    request: Message
    answer: Future[Message] | None


class FaultyTransport:
    """Calls of `Embedded` through a bad network: `script` says what befalls the next calls, NONE where it is empty.

    Answers are there when `call` returns, or will not come before `release`.
    """

    name = "faulty"

    def __init__(self, server: Embedded) -> None:
        self.plane = InlinePlane()
        self.script: list[Fault] = []
        self.held: list[Held] = []
        self.calls: list[Message] = []
        self._service = server._service  # with bytes in the messages, as over gRPC
        self._is_closed = False

    def call(self, method: str, request: Message, timeout_s: float) -> Future[Message]:
        """Begins a call, which meets what the script says next."""
        answer: Future[Message] = Future()
        copy = type(request)()
        copy.CopyFrom(request)
        self.calls.append(copy)
        fault = self.script.pop(0) if self.script else Fault.NONE
        if self._is_closed:
            answer.set_exception(ClientClosed("closed"))
        elif fault in (Fault.HELD, Fault.FLOATING):
            self.held.append(Held(method, copy, answer if fault is Fault.HELD else None))
        elif fault not in (Fault.REQUEST_LOST, Fault.SWALLOWED):
            for _ in range(1 + (fault is Fault.TWICE)):
                outcome = self._deliver(method, copy)
            if fault in (Fault.NONE, Fault.TWICE):
                _hand_on(outcome, answer)
        if fault in (Fault.REQUEST_LOST, Fault.REPLY_LOST, Fault.FLOATING):
            answer.set_exception(Unavailable("the connection broke"))
        return answer

    def release(self, index: int = 0) -> None:
        """Lets one held request arrive."""
        held = self.held.pop(index)
        outcome = self._deliver(held.method, held.request)
        if held.answer is not None:
            _hand_on(outcome, held.answer)

    def close(self) -> None:
        """Further calls fail."""
        self._is_closed = True

    def _deliver(self, method: str, request: Message) -> Future[Message]:
        outcome = self._service.call(method, request, Caller(tenant=TENANT, plane=ServerPlane(1 << 26)))
        outcome.exception(timeout=30)
        return outcome


def _hand_on(outcome: Future[Message], answer: Future[Message]) -> None:
    error = outcome.exception()
    if error is None:
        answer.set_result(outcome.result())
        return
    assert isinstance(error, MemstoreError)
    delay_s = getattr(error, "retry_delay_s", None)
    answer.set_exception(from_class_name(type(error).__name__, error.message, error.metadata, delay_s))
