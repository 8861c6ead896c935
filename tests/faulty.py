"""FaultyTransport: a network that loses, repeats, delays and reorders, before the real service; FakeClock: no time.

Bench: a session over such a network, and what came of it.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import pytest
import torch

from memstore.embedded import TENANT
from memstore.errors import MemstoreError
from memstore.plane import InlinePlane as ServerPlane
from memstore.service import Caller
from model_client import MemoryClient, Retrieval
from model_client.errors import ClientClosed, Late, Unavailable, from_class_name
from model_client.seams import Clock
from model_client.wire import InlinePlane

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from memstore.embedded import Embedded
    from model_client import PendingStep, Session


CAPACITY = 64
EVERYTHING = Retrieval(top_k=CAPACITY)
DEADLINE_S = 0.01  # shorter than the first pause, so that nothing is tried twice within a step


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
        self.server_plane = ServerPlane(1 << 26)
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
        outcome = self._service.call(method, request, Caller(tenant=TENANT, plane=self.server_plane))
        outcome.exception(timeout=30)
        return outcome


class Bench:
    """A session over a bad network, and a clean client that looks at what came of it. Rows are the numbers 1, 2, ..."""

    def __init__(self, server: Embedded, *, sequences: tuple[str, ...] = ("a",), timeout_s: float = DEADLINE_S) -> None:
        self.network = FaultyTransport(server)
        self.clock = FakeClock()
        self.client = MemoryClient(
            transport=self.network, clock=self.clock, timeout_s=timeout_s, breaker_failures=1_000_000
        )
        self.clean = MemoryClient(transport=FaultyTransport(server), timeout_s=30.0)
        memories = [each.spec.name for each in self.clean.list_memories()]
        for name in memories:
            self.clean.drop_memory(name)
        self.clean.create_memory(
            "m", dim=1, capacity=CAPACITY, max_sequences=4, dtype=torch.float32, payloads={"twice": (torch.int32, (1,))}
        )
        self.session: Session = self.client.session("m", sequences)
        self._next = 0

    def rows(self, count: int) -> tuple[list[int], torch.Tensor]:
        """The next rows, as numbers and as keys."""
        numbers = list(range(self._next + 1, self._next + 1 + count))
        self._next += count
        return numbers, torch.tensor(numbers, dtype=torch.float32).reshape(-1, 1)

    def start(
        self, count: int = 1, *, is_start: bool = False, retrieve: Retrieval | None = EVERYTHING
    ) -> tuple[list[int], PendingStep]:
        """Begins to append the next rows to the first sequence."""
        numbers, keys = self.rows(count)
        payloads = {"twice": (keys * 2).int()}
        counts = [count] + [0] * (len(self.session.sequences) - 1)
        pending = self.session.start_step(
            keys, counts, retrieve=retrieve, append=True, payloads=payloads, start_of_sequence=is_start
        )
        return numbers, pending

    def append(
        self, count: int = 1, *faults: Fault, is_start: bool = False, retrieve: Retrieval | None = EVERYTHING
    ) -> list[int]:
        """Appends through these faults, and expects it to succeed."""
        self.network.script = list(faults)
        numbers, pending = self.start(count, is_start=is_start, retrieve=retrieve)
        pending.result()
        return numbers

    def fail(self, count: int, *faults: Fault, is_start: bool = False) -> list[int]:
        """Appends through these faults, and expects that no answer comes."""
        self.network.script = list(faults)
        numbers, pending = self.start(count, is_start=is_start)
        with pytest.raises((Unavailable, Late)):
            pending.result()
        return numbers

    def content(self, sequence: str = "a") -> list[int]:
        """The rows that a sequence holds, by position; positions are gap-free and payloads belong to their keys."""
        reader = self.clean.session("m", [sequence])
        retrieval = Retrieval(top_k=CAPACITY, arrays=("key", "twice"))
        hits = reader.retrieve(torch.zeros(1, 1), [1], retrieval).hits
        assert hits is not None
        positions = hits.positions.tolist()
        assert positions == list(range(min(positions, default=0), min(positions, default=0) + len(positions)))
        assert torch.equal(hits.rows["twice"], (hits.rows["key"] * 2).int())
        return [int(value) for value in hits.rows["key"][:, 0].tolist()]


def _hand_on(outcome: Future[Message], answer: Future[Message]) -> None:
    error = outcome.exception()
    if error is None:
        answer.set_result(outcome.result())
        return
    assert isinstance(error, MemstoreError)
    delay_s = getattr(error, "retry_delay_s", None)
    answer.set_exception(from_class_name(type(error).__name__, error.message, error.metadata, delay_s))
