"""SessionCore: the steps of one session as flows, each append applied exactly once and in order.

A step that changes sequences (appends, or starts one) is under way from its sending until its outcome is known. What is
under way is kept, rows included, and asked for again with the same seqs before anything later of the session is sent,
so an append is never applied twice, never out of order, and no seq is ever given to other rows. See Session.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from memstore.v1 import memstore_pb2 as pb
from model_client import wire
from model_client.core import Core, Flow, OneCall, expect
from model_client.errors import (
    AlreadyExists,
    Busy,
    CircuitOpen,
    Corrupt,
    DeviceMemoryFull,
    EpochChanged,
    Internal,
    InvalidRequest,
    Late,
    MemstoreClientError,
    NotAllowed,
    NotAuthenticated,
    NotFound,
    PositionExpired,
    QuotaExceeded,
    SequenceGap,
    Unavailable,
)
from model_client.numbering import Numbering
from model_client.row_cache import RowCache
from model_client.sending import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from model_client.row_cache import Asked

MAX_UNDER_WAY = 2
"""Steps whose outcome is not known that a session keeps."""

_FINAL = (InvalidRequest, NotFound, NotAllowed, NotAuthenticated, Corrupt, AlreadyExists, PositionExpired)
"""Refusals after which a request is not sent again, whatever its copies have met."""

_HOST = torch.device("cpu")

_NO_ROOM = (QuotaExceeded, DeviceMemoryFull)
"""Refusals that may be owed to what a step retrieves, and last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCall:
    """What a step is asked to do.

    parts: a StepRequest in wire form, whose parts have their rows and starts, and no numbers yet. num_rows: of all.
    """

    rows: wire.StepRows
    parts: bytes
    num_rows: int
    has_start: bool
    retrieve: wire.Retrieval | None
    append: bool


class SessionCore:
    """What Session and AsyncSession do, as flows."""

    def __init__(self, core: Core, memory: str, sequences: Sequence[str], row_cache_bytes: int) -> None:
        self.memory = memory
        self.sequences = tuple(sequences)
        self._core = core
        self._writer = uuid.uuid4().hex
        self._numbering = Numbering(self.sequences)
        self._under_way: list[Step] = []
        self._waiting: Step | None = None
        self._row_cache = RowCache(row_cache_bytes)

    def step(self, call: StepCall, timeout_s: float) -> Flow[wire.StepResult]:
        """One step, from the breaker to tensors on the device of its keys."""
        try:
            return (yield from self._core.guarded(self._step(call, self._core.clock.monotonic() + timeout_s)))
        except CircuitOpen:
            if call.append:
                self._core.stats.add("dropped_rows", call.num_rows)
            raise

    def reset(self, timeout_s: float) -> Flow[None]:
        """Empties every sequence of the session; what is under way is settled or given up first."""
        return self._core.guarded(self._reset(self._core.clock.monotonic() + timeout_s))

    def fork(self, source: str, target: str, timeout_s: float) -> Flow[pb.ForkResponse]:
        """Gives `target` what `source` holds once all that is under way is settled."""
        return self._core.guarded(self._fork(source, target, self._core.clock.monotonic() + timeout_s))

    def _step(self, call: StepCall, until: float) -> Flow[wire.StepResult]:
        plane = self._core.transport.plane
        request = wire.step_request(plane, self.memory, call.rows, call.retrieve, call.append, self._writer)
        request.MergeFromString(call.parts)
        step = Step(self._core, request, call.rows)
        asked = self._ask(step, call)
        is_read = False
        try:
            if call.append or call.has_start:
                reply = yield from self._change(step, call.has_start, until)
            else:
                while any(other.has_start for other in self._under_way):
                    yield from self._settle_first(until)
                reply = expect((yield from self._core.attempts(step, until)), pb.StepResponse)
            if step.refusal is not None:
                raise Unavailable(f"the rows are appended, but what was retrieved is lost, and now: {step.refusal}")
            result = self._result(reply, asked, call.rows.keys.device)
            is_read = True
            return result
        finally:
            if not is_read:
                step.abandon()
            if not step.num_sendings:
                self._drop(step)
                plane.discard(request)

    def _ask(self, step: Step, call: StepCall) -> Asked | None:
        """Has a step tell which rows the session has; None where it need not."""
        if call.retrieve is None or self._core.transport.plane.name != "inline":
            return None
        asked = self._row_cache.ask(call.retrieve, call.rows.keys.shape[0], step.parts, call.num_rows)
        if asked is not None:
            asked.write(step.request.retrieve)
        return asked

    def _result(self, reply: pb.StepResponse, asked: Asked | None, device: torch.device) -> wire.StepResult:
        """A reply as tensors on `device`, with the rows that the session had."""
        plane = self._core.transport.plane
        if asked is None:
            return wire.step_result(plane, reply, device)
        left_out = wire.left_out(plane, reply)
        result, num_reused = self._row_cache.complete(asked, wire.step_result(plane, reply, _HOST), left_out)
        self._core.stats.add("reused_rows", num_reused)
        return wire.on_device(result, device)

    def _change(self, step: Step, has_start: bool, until: float) -> Flow[pb.StepResponse]:
        """Waits until the step may be sent, numbers and sends it, and settles it."""
        if self._waiting is not None:
            raise Busy(f"{MAX_UNDER_WAY} steps of this session are under way and one waits; await those first")
        self._waiting = step
        try:
            self._collect()
            self._give_up(lambda other: _is_superseded(other, step))
            while not self._may_follow(step):
                yield from self._settle_first(until)
            if has_start:
                yield from self._learn_epochs(step, until)
        finally:
            self._waiting = None
        self._under_way.append(step)
        self._stamp(step, step.parts)
        return (yield from self._settle(step, until))

    def _may_follow(self, step: Step) -> bool:
        """True where `step` can be sent before what is under way is settled: the server tells them apart by their seqs,
        so it takes known epochs, no start among them, and nothing that has failed and must be sent again first.
        """
        if not self._under_way:
            return True
        has_start = any(other.has_start for other in (*self._under_way, step))
        has_failed = any(other.future is None or other.future.done() for other in self._under_way)
        is_known = all(self._numbering.epoch(part.sequence) for part in step.parts)
        return is_known and not has_start and not has_failed and len(self._under_way) < MAX_UNDER_WAY

    def _settle_first(self, until: float) -> Flow[None]:
        """Settles the oldest step under way; raises only where its outcome is still not known."""
        oldest = self._under_way[0]
        try:
            yield from self._settle(oldest, until)
        except MemstoreClientError:
            if oldest in self._under_way:
                raise

    def _settle(self, step: Step, until: float) -> Flow[pb.StepResponse]:
        """Sends a step, again where needed, until its outcome is known. Any of the session's flows may do it."""
        for _ in range(4 + 2 * len(step.parts)):
            try:
                reply = yield from self._attempt(step, until)
            except MemstoreClientError as error:
                if self._may_forgo_hits(step, error):
                    step.forgo_hits(error)
                    continue
                self._refuse(step, error)
                if not step.outcome.done() or step.outcome.exception() is error:
                    raise
            else:
                if reply is not None:
                    self._acknowledge(step, reply)
                    return reply
        raise Internal(f"the epochs of {list(self.sequences)} change faster than a step can follow")

    def _attempt(self, step: Step, until: float) -> Flow[pb.StepResponse | None]:
        """One sending and its answer; None where the step was numbered anew instead, and is to be sent again."""
        try:
            return expect((yield from self._core.attempts(step, until)), pb.StepResponse)
        except (EpochChanged, SequenceGap) as error:
            if step.future is None and not step.outcome.done():
                yield from self._correct(step, error, until)
            return None

    def _correct(self, step: Step, error: MemstoreClientError, until: float) -> Flow[None]:
        """Numbers one sequence anew after EpochChanged; fills the hole before it after SequenceGap."""
        part = step.part(error.metadata.get("sequence", ""))
        while self._under_way[0] is not step:
            yield from self._settle_first(until)
        if isinstance(error, EpochChanged):
            if part.epoch == self._numbering.epoch(part.sequence):
                self._numbering.adopt(part.sequence, int(error.metadata["epoch"]))
                self._core.stats.add("lost_epochs")
            self._stamp(step, (part,))
            return
        expected = int(error.metadata["expected_seq"])
        if part.seq - expected > MAX_UNDER_WAY:
            self._become_another_writer(step)
        for seq in range(expected, part.seq):
            yield from self._fill(step, part, seq, until)

    def _fill(self, step: Step, part: pb.SequencePart, seq: int, until: float) -> Flow[None]:
        """Uses up a seq whose append was refused after a later one had left: nothing can be applied under it then."""
        empty = wire.StepRows(
            keys=wire.empty_like(step.request.keys),
            payloads={each.name: wire.empty_like(each.tensor) for each in step.request.payloads},
        )
        request = wire.step_request(self._core.transport.plane, self.memory, empty, None, True, self._writer)
        request.sequences.add(sequence=part.sequence, epoch=part.epoch, seq=seq)
        try:
            yield from self._core.attempts(Step(self._core, request, empty), until)
        except AlreadyExists:
            return

    def _learn_epochs(self, step: Step, until: float) -> Flow[None]:
        """Asks for the epochs of the sequences to be started where they are not known.

        A start that names the epoch it ends cannot be done again by a copy that arrives late; without one it could.
        """
        parts = step.parts
        names = [part.sequence for part in parts if part.start_of_sequence and not self._numbering.epoch(part.sequence)]
        if not names:
            return
        plane, nothing = self._core.transport.plane, wire.Retrieval(top_k=1, arrays=(), scores=False)
        empty = wire.StepRows(keys=wire.empty_like(step.request.keys), payloads={})
        request = wire.step_request(plane, self.memory, empty, nothing, False, "")
        request.sequences.extend(pb.SequencePart(sequence=name) for name in names)
        reply = expect((yield from self._core.attempts(Step(self._core, request, empty), until)), pb.StepResponse)
        plane.discard(reply)
        for name, result in zip(names, reply.sequences, strict=True):
            self._numbering.adopt(name, result.epoch)

    def _become_another_writer(self, step: Step) -> None:
        """Begins to count anew: the server remembers only those who appended last, and no more this session.

        Nothing of the forgotten writer that is still on its way can be applied: its seq is beyond the one expected.
        """
        if step.request.writer == self._writer:
            self._writer = uuid.uuid4().hex
            for name in self.sequences:
                self._numbering.adopt(name, self._numbering.epoch(name))
        step.request.writer = self._writer
        self._stamp(step, step.parts)

    def _stamp(self, step: Step, parts: Iterable[pb.SequencePart]) -> None:
        """Numbers some parts of a step."""
        step.seqs_before |= self._numbering.stamp(parts, step.request.append)

    def _collect(self) -> None:
        """Acknowledges what was answered while nobody waited."""
        for step in tuple(self._under_way):
            if step.future is not None and step.future.done() and step.future.exception() is None:
                self._acknowledge(step, expect(step.future.result(), pb.StepResponse))

    def _acknowledge(self, step: Step, reply: pb.StepResponse) -> None:
        if step in self._under_way:
            self._under_way.remove(step)
            step.results = tuple(reply.sequences)
            self._numbering.acknowledge(step.parts, step.results)
            step.outcome.set_result(reply)

    def _may_forgo_hits(self, step: Step, error: MemstoreClientError) -> bool:
        """True where an earlier sending may have done the step, and what refuses this one may be owed to its hits."""
        is_perhaps_done = step in self._under_way and step.future is None and step.may_be_done
        return is_perhaps_done and step.retrieves and isinstance(error, _NO_ROOM)

    def _refuse(self, step: Step, error: MemstoreClientError) -> None:
        """Ends a step that was certainly not done, or that the server will not take; any other stays under way.

        Where an earlier sending may have done it, its seqs stay given out: what follows finds out (SequenceGap). But
        the seq of a start is the first of another epoch, and says nothing.
        """
        is_certain = step.future is None and not error.is_outcome_unknown and not step.may_be_done
        is_final = isinstance(error, _FINAL) or (isinstance(error, _NO_ROOM) and not step.retrieves)
        if step not in self._under_way or not (is_certain or is_final):
            return
        self._end(step, error)
        is_undone = is_certain or isinstance(error, InvalidRequest)
        for part in step.parts:
            if isinstance(error, NotFound):
                self._numbering.adopt(part.sequence, 0)
            elif isinstance(error, AlreadyExists | PositionExpired):
                continue
            elif is_undone or part.start_of_sequence:
                self._numbering.take_back(part, step.seqs_before[part.sequence])

    def _give_up(self, is_needless: Callable[[Step], bool]) -> None:
        """Ends those that have failed and are needless, where the epochs they name keep a late copy from being done."""
        for step in tuple(self._under_way):
            is_failed = step.future is None or step.future.done()
            is_fenced = all(part.epoch for part in step.parts)
            if is_failed and is_fenced and is_needless(step):
                self._end(step, Late("given up: its sequences were emptied before it was known to be done"))

    def _end(self, step: Step, error: MemstoreClientError) -> None:
        self._under_way.remove(step)
        self._drop(step)
        step.outcome.set_exception(error)

    def _drop(self, step: Step) -> None:
        if step.request.append:
            self._core.stats.add("dropped_rows", step.num_rows)

    def _reset(self, until: float) -> Flow[None]:
        self._give_up(lambda step: True)
        while self._under_way:
            yield from self._settle_first(until)
        request = pb.ResetRequest(memory=self.memory, sequences=self.sequences)
        exchange = OneCall(self._core.transport, "Reset", request)
        reply = expect((yield from self._core.attempts(exchange, until)), pb.ResetResponse)
        for name, epoch in zip(self.sequences, reply.epochs, strict=True):
            self._numbering.adopt(name, epoch)

    def _fork(self, source: str, target: str, until: float) -> Flow[pb.ForkResponse]:
        while self._under_way:
            yield from self._settle_first(until)
        epoch = self._numbering.epoch(source) if source in self.sequences else 0
        request = pb.ForkRequest(memory=self.memory, source=source, target=target, epoch=epoch)
        exchange = OneCall(self._core.transport, "Fork", request, is_repeatable=False)
        reply = expect((yield from self._core.attempts(exchange, until)), pb.ForkResponse)
        if target in self.sequences:
            self._numbering.adopt(target, reply.epoch)
        return reply


def _is_superseded(older: Step, newer: Step) -> bool:
    """True where `newer` empties all that `older` may have appended to.

    An older start is not: both would name the epoch that it ends, and be told apart by their rows alone.
    """
    started = {part.sequence for part in newer.parts if part.start_of_sequence}
    return not older.has_start and started.issuperset(part.sequence for part in older.parts)
