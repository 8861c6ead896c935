"""Talk: the steps of one stream on their way, whose answers leave in the order of their arrival."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future

    from google.protobuf.message import Message

    from memstore.arrival import Context
    from memstore.auth import Credentials
    from memstore.replies import Reader, ReplyPlane


@dataclass(slots=True)
class Flight:
    """A step of a stream on its way. began, deadline: monotonic seconds; alarm: rings at the deadline."""

    call_id: int
    piece_bytes: int
    future: Future[Message]
    plane: ReplyPlane
    began: float
    deadline: float | None
    is_late: bool = False
    alarm: asyncio.TimerHandle | None = None

    @property
    def is_over(self) -> bool:
        """True once it is answered, or its time is over."""
        return self.is_late or self.future.done()

    def drop(self) -> None:
        """Nobody wants the answer."""
        self.future.cancel()
        self.plane.release()


class Talk:
    """One stream: what its caller carries, who takes its answers, and the steps on their way.

    deadline: of the stream, in monotonic seconds.
    """

    def __init__(
        self, context: Context, credentials: Credentials, request_id: str, deadline: float | None, reader: Reader
    ) -> None:
        self.context = context
        self.credentials = credentials
        self.request_id = request_id
        self.deadline = deadline
        self.reader = reader
        self.current: Flight | None = None
        self.num_open = 0
        self.has_stalled = False
        self._flights: deque[Flight | None] = deque()
        self._loop = asyncio.get_running_loop()
        self._called: asyncio.Future[None] | None = None
        self._taken = asyncio.Event()

    def put(self, flight: Flight, left_s: float | None) -> None:
        """Takes a step whose time is over in `left_s`; it is next when it is over, and all before it are answered."""
        self.num_open += 1
        self._flights.append(flight)
        if left_s is not None:
            flight.alarm = self._loop.call_later(left_s, self._be_late, flight)
        flight.future.add_done_callback(self._tell)

    def end(self) -> None:
        """There will be no more steps."""
        self._flights.append(None)
        self._call()

    async def next(self) -> Flight | None:
        """The next step, in order, once it is over; None at the end of them."""
        self.current = None  # or an idle stream would keep its last answer
        while not self._flights or ((first := self._flights[0]) is not None and not first.is_over):
            self._called = self._loop.create_future()
            await self._called
        self.current = flight = self._flights.popleft()
        if flight is not None and flight.alarm is not None:
            flight.alarm.cancel()
        return flight

    def take(self, flight: Flight) -> None:
        """The answer to a step has been taken."""
        flight.plane.release()
        self.num_open -= 1
        self._taken.set()

    async def taken(self) -> None:
        """Waits for the next answer that is taken."""
        self._taken.clear()
        await self._taken.wait()

    def stall(self) -> None:
        """Gives up all but the message that is with gRPC already: that cannot be called back, nor the stream ended."""
        self.has_stalled = True
        if self.current is not None and self.current.piece_bytes:
            self.current.plane.release()
        self._drop_waiting()

    def close(self) -> None:
        """Gives up whatever is on its way."""
        if self.current is not None:
            self.current.drop()
        self._drop_waiting()

    def _drop_waiting(self) -> None:
        while self._flights:
            flight = self._flights.popleft()
            if flight is not None:
                if flight.alarm is not None:
                    flight.alarm.cancel()
                flight.drop()

    def _be_late(self, flight: Flight) -> None:
        flight.is_late = True
        self._call()

    def _tell(self, _: Future[Message]) -> None:
        """In any thread: a step is answered."""
        with suppress(RuntimeError):  # the loop may be closed by then
            self._loop.call_soon_threadsafe(self._call)

    def _call(self) -> None:
        if self._called is not None and not self._called.done():
            self._called.set_result(None)
