"""Step: one step of a session, from its first sending to the outcome."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from model_client import wire
from model_client.errors import Internal, MemstoreClientError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from memstore.v1 import memstore_pb2 as pb
    from model_client.core import Core
    from model_client.transport.base import TensorPlane


class Step:
    """One step of a session: its request, the sending under way, and in the end its outcome."""

    def __init__(self, core: Core, request: pb.StepRequest, rows: wire.StepRows) -> None:
        self.request = request
        self.parts = tuple(request.sequences)  # to make objects of them takes longer than to read them
        self.results: tuple[pb.SequenceResult, ...] = ()  # of the outcome, likewise
        self.future: Future[Message] | None = None
        self.outcome: Future[Message] = Future()
        self.may_be_done = False  # a sending whose effect is not known
        self.num_sendings = 0
        self.seqs_before: dict[str, int] = {}
        self.refusal: MemstoreClientError | None = None  # of what it would have retrieved
        self._overdue_at = 0.0
        self._core = core
        self._rows = rows if core.transport.plane.is_single_use else None
        self._is_abandoned = False
        self._discard = partial(_discard, core.transport.plane)  # knows no more, so that it keeps no client alive

    @property
    def has_start(self) -> bool:
        """True where a sequence is emptied."""
        return any(part.start_of_sequence for part in self.parts)

    @property
    def retrieves(self) -> bool:
        """True where the next sending asks for hits."""
        return self.request.HasField("retrieve")

    @property
    def num_rows(self) -> int:
        """Rows of the step in each layer."""
        return sum(part.num_rows for part in self.parts)

    def part(self, sequence: str) -> pb.SequencePart:
        """The part of one sequence."""
        for part in self.parts:
            if part.sequence == sequence:
                return part
        raise Internal(f"the server answered about a sequence that was not asked for: {sequence!r}")

    def submit(self, timeout_s: float) -> Future[Message]:
        """The outcome if it is known, the sending under way unless it has failed or is overdue, else a new sending."""
        if self.outcome.done():
            return self.outcome
        now = self._core.clock.monotonic()
        if self.future is not None and self.future.done():
            self._note_failure(self.future)
        elif self.future is not None and now >= self._overdue_at:
            self.future, self.may_be_done = None, True
        if self.future is None:
            self._overdue_at = now + timeout_s
            if self.num_sendings:
                self._core.stats.add("resends")
                if self._is_abandoned:  # so that no search can hold up its rows
                    self.request.ClearField("retrieve")
                if self._rows is not None:
                    wire.write_rows(self._core.transport.plane, self.request, self._rows)
            self.num_sendings += 1
            self.future = self._core.transport.call("Step", self.request, timeout_s)
            if self._is_abandoned:
                self.future.add_done_callback(self._discard)
        return self.future

    def note(self, future: Future[Message], error: MemstoreClientError) -> bool:
        """Forgets a sending that has failed; one that is merely late stays under way."""
        if future.done():
            self._note_failure(future)
        return True

    def forgo_hits(self, refusal: MemstoreClientError) -> None:
        """Asks for the append alone from now on, as what it retrieves is refused."""
        self.refusal = refusal
        self.request.ClearField("retrieve")

    def abandon(self) -> None:
        """Tells that nobody will read the answer."""
        self._is_abandoned = True
        self.outcome.add_done_callback(self._discard)
        if self.future is not None:
            self.future.add_done_callback(self._discard)

    def _note_failure(self, future: Future[Message]) -> None:
        error = future.exception()
        if error is not None:
            self.may_be_done |= not isinstance(error, MemstoreClientError) or error.is_outcome_unknown
            if future is self.future:
                self.future = None


def _discard(plane: TensorPlane, future: Future[Message]) -> None:
    if future.exception() is None:
        plane.discard(future.result())
