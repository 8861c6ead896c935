"""DeviceWorker: joins what can be joined, keeps order, and never lets late or broken requests near the device."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest
import torch

from memstore.admission import Admission, QueueLimits
from memstore.device import DeviceWorker
from memstore.errors import (
    DeviceMemoryFull,
    Expired,
    Internal,
    InvalidRequest,
    MemstoreError,
    NotFound,
    NotReady,
    Overloaded,
    QuotaExceeded,
)
from memstore.jobs import CallJob, StepJob, Ticket
from memstore.joining import MAX_JOINED_ROWS
from memstore.types import RetrieveOptions, SequencePart, SequenceResult, StepBatch
from tests.fakes import FakeClock, FakeEngine, FakeReply, held

if TYPE_CHECKING:
    from collections.abc import Iterator

Answer = tuple[SequenceResult, ...]
TOP_1, TOP_2 = RetrieveOptions(top_k=1), RetrieveOptions(top_k=2)


class Bench:
    """A worker on the host with a clock that stands still."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.admission = Admission(QueueLimits(max_requests=8))
        self.worker = DeviceWorker(torch.device("cpu"), self.admission, self.clock)
        self.engine = FakeEngine()

    def job(
        self,
        batch: StepBatch,
        engine: FakeEngine | None = None,
        deadline: float | None = None,
        reply: FakeReply | None = None,
    ) -> StepJob[Answer]:
        """A step whose answer is what happened to its sequences."""
        ticket = Ticket(tenant="t", num_bytes=8, deadline=deadline, request_id="r1")
        return StepJob(ticket, "notes", engine or self.engine, lambda: batch, reply or FakeReply())

    def step(self, batch: StepBatch, deadline: float | None = None) -> Future[Answer]:
        return self.worker.submit(self.job(batch, deadline=deadline))


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.worker.close()
    assert made.admission.num_requests == 0


def batch(
    *sequences: str,
    retrieve: RetrieveOptions | None = TOP_1,
    layers: tuple[int, ...] = (0,),
    rows: int = 1,
    append: bool = False,
) -> StepBatch:
    parts = tuple(SequencePart(sequence=name, num_rows=rows) for name in sequences)
    keys = torch.zeros(len(layers), rows * len(parts), 1)
    return StepBatch(parts=parts, layers=layers, keys=keys, retrieve=retrieve, append=append)


def test_what_is_queued_together_is_searched_together(bench: Bench) -> None:
    with held(bench.worker):
        futures = [bench.step(batch(name)) for name in "abc"]
    assert [future.result()[0].epoch for future in futures] == [1, 1, 1]
    assert bench.engine.joined == [["a", "b", "c"]]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (batch("a"), batch("a")),
        (batch("a", "b"), batch("c", "b")),
        (batch("a"), batch("b", retrieve=TOP_2)),
        (batch("a"), batch("b", layers=(1,))),
        (batch("a", rows=MAX_JOINED_ROWS), batch("b")),
    ],
    ids=["the same sequence", "a shared sequence", "other options", "other layers", "too many rows"],
)
def test_what_cannot_be_joined_is_done_in_order(bench: Bench, first: StepBatch, second: StepBatch) -> None:
    with held(bench.worker):
        futures = [bench.step(first), bench.step(second)]
    for future in futures:
        future.result()
    assert bench.engine.calls == [[first], [second]]


def test_appends_join_any_search(bench: Bench) -> None:
    with held(bench.worker):
        futures = [
            bench.step(batch("a", retrieve=None, append=True, layers=(0, 1))),
            bench.step(batch("b", retrieve=TOP_2)),
            bench.step(batch("c", retrieve=None, append=True, layers=(0, 1))),
        ]
    for future in futures:
        future.result()
    assert bench.engine.joined == [["a", "b", "c"]]


def test_memories_are_joined_each_by_itself(bench: Bench) -> None:
    other = FakeEngine()
    with held(bench.worker):
        futures = [
            bench.worker.submit(bench.job(batch(name), engine)) for name in "ab" for engine in (bench.engine, other)
        ]
    for future in futures:
        future.result()
    assert bench.engine.joined == other.joined == [["a", "b"]]


def test_other_work_keeps_its_place_among_steps(bench: Bench) -> None:
    seen: list[int] = []
    ticket = Ticket(tenant="t", num_bytes=0, deadline=None, request_id="r2")
    with held(bench.worker):
        before = bench.step(batch("a"))
        call = bench.worker.submit(CallJob(ticket, lambda: seen.append(len(bench.engine.calls))))
        after = bench.step(batch("b"))
    before.result()
    call.result()
    after.result()
    assert seen == [1]
    assert bench.engine.joined == [["a"], ["b"]]


def test_a_late_request_never_reaches_the_engine(bench: Bench) -> None:
    with held(bench.worker):
        late = bench.step(batch("a"), deadline=bench.clock.now + 1)
        timely = bench.step(batch("b"), deadline=bench.clock.now + 3)
        bench.clock.advance(1)
    with pytest.raises(Expired):
        late.result()
    timely.result()
    assert bench.engine.joined == [["b"]]


def test_a_request_that_is_late_already_is_not_queued(bench: Bench) -> None:
    with pytest.raises(Expired):
        bench.step(batch("a"), deadline=bench.clock.now)
    assert bench.engine.calls == []


def test_a_cancelled_request_never_reaches_the_engine(bench: Bench) -> None:
    with held(bench.worker):
        gone = bench.step(batch("a"))
        assert gone.cancel()
        kept = bench.step(batch("b"))
    kept.result()
    with pytest.raises(CancelledError):
        gone.result()
    assert bench.engine.joined == [["b"]]


def test_one_refusal_leaves_the_others_alone(bench: Bench) -> None:
    bench.engine.refusals["b"] = NotFound("none")
    with held(bench.worker):
        futures = [bench.step(batch(name)) for name in "abc"]
    futures[0].result()
    futures[2].result()
    with pytest.raises(NotFound):
        futures[1].result()


def test_a_request_that_cannot_be_read_is_left_out(bench: Bench) -> None:
    def refuse() -> StepBatch:
        raise InvalidRequest("keys", "missing")

    bad = bench.job(batch("a"))
    bad.decode = refuse
    with held(bench.worker):
        refused, served = bench.worker.submit(bad), bench.step(batch("b"))
    with pytest.raises(InvalidRequest):
        refused.result()
    served.result()
    assert bench.engine.joined == [["b"]]


def test_a_bug_fails_its_request_and_not_the_thread(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.engine.failure = ZeroDivisionError("secret rows")
    with pytest.raises(Internal) as caught:
        bench.step(batch("a")).result()
    assert caught.value.metadata == {"request_id": "r1"}
    assert "secret" not in caught.value.message
    assert "secret rows" in caplog.text
    bench.engine.failure = None
    bench.step(batch("a")).result()


@pytest.mark.parametrize(
    ("where", "failure", "kind"),
    [
        ("carry_failure", KeyError("position"), Internal),
        ("carry_failure", QuotaExceeded("too large"), QuotaExceeded),
        ("carry_failure", torch.OutOfMemoryError("CUDA out of memory"), DeviceMemoryFull),
        ("finish_failure", KeyError("position"), Internal),
    ],
)
def test_a_reply_that_cannot_be_made_fails_its_request(
    bench: Bench, where: str, failure: Exception, kind: type[MemstoreError]
) -> None:
    reply = FakeReply()
    setattr(reply, where, failure)
    with held(bench.worker):
        broken = bench.worker.submit(bench.job(batch("a"), reply=reply))
        other = bench.step(batch("b"))
    with pytest.raises(kind):
        broken.result()
    assert reply.is_discarded
    assert other.result()[0].epoch == 1


def test_no_working_memory_is_no_bug(bench: Bench) -> None:
    bench.engine.failure = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(DeviceMemoryFull):
        bench.step(batch("a")).result()
    assert not bench.worker.is_sick


def test_no_pinned_memory_is_no_bug_either(bench: Bench) -> None:
    error = torch.AcceleratorError("CUDA error: out of memory")
    error.error_code = 2  # cudaErrorMemoryAllocation
    bench.engine.failure = error
    with pytest.raises(DeviceMemoryFull):
        bench.step(batch("a")).result()
    assert not bench.worker.is_sick


def test_what_spoils_a_capture_fails_its_request_and_not_the_device(bench: Bench) -> None:
    error = torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")
    error.error_code = 900  # cudaErrorStreamCaptureUnsupported
    bench.engine.failure = error
    with pytest.raises(Internal):
        bench.step(batch("a")).result()
    bench.engine.failure = None
    assert bench.step(batch("a")).result()[0].epoch == 1
    assert not bench.worker.is_sick


def test_a_failed_device_takes_no_more(bench: Bench) -> None:
    bench.engine.failure = torch.AcceleratorError("CUDA error: an illegal memory access")
    with pytest.raises(Internal):
        bench.step(batch("a")).result()
    assert bench.worker.is_sick
    bench.engine.failure = None
    with pytest.raises(NotReady, match="restarted"):
        bench.step(batch("a")).result()
    assert bench.engine.calls == []


@pytest.mark.parametrize("where", ["take", "end"])
def test_a_bug_beside_the_requests_hangs_nobody(bench: Bench, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known to be as it should after it, as after a failure of the device: the server is to be restarted."""
    sick = threading.Event()
    bench.worker.on_sick = sick.set
    with held(bench.worker):
        waiting = [bench.step(batch(name)) for name in "abc"]
        monkeypatch.setattr(bench.worker._turns, where, Mock(side_effect=OverflowError("a bug")))
    for step in waiting:
        with pytest.raises(Internal):
            step.result(timeout=60)
    assert sick.wait(60)
    monkeypatch.undo()
    with pytest.raises(NotReady, match="restarted"):
        bench.step(batch("a")).result(timeout=60)
    assert bench.admission.num_requests == 0


def test_a_bug_while_a_turn_is_served_fails_what_was_not_answered(bench: Bench) -> None:
    bench.worker._observer = Mock(joined=Mock(side_effect=[None, ZeroDivisionError("a bug")]))
    other = FakeEngine()
    with held(bench.worker):
        answered = bench.step(batch("a"))
        not_answered = bench.worker.submit(bench.job(batch("b"), other))
        behind = bench.step(batch("c"))
    assert answered.result(timeout=60)[0].epoch == 1
    with pytest.raises(Internal):
        not_answered.result(timeout=60)
    assert behind.result(timeout=60)[0].epoch == 1  # it was joined with the first
    with pytest.raises(NotReady, match="restarted"):
        bench.step(batch("a")).result(timeout=60)


def test_a_full_queue_refuses_at_once(bench: Bench) -> None:
    with held(bench.worker):
        waiting = [bench.step(batch(str(i))) for i in range(8)]
        with pytest.raises(Overloaded):
            bench.step(batch("more"))
    for future in waiting:
        future.result()
    bench.step(batch("more")).result()


def test_rows_leave_the_thread_outside_of_autograd(bench: Bench) -> None:
    """The reader may put them into its own graph, which inference tensors would not allow."""
    made = bench.worker.control(lambda: torch.ones(2) * torch.ones(2, requires_grad=True)).result()
    assert not made.requires_grad
    assert not made.is_inference()


def test_closing_answers_what_is_queued_and_refuses_the_rest() -> None:
    bench = Bench()
    with held(bench.worker):
        queued = bench.step(batch("a"))
    bench.worker.close()
    queued.result()
    with pytest.raises(NotReady):
        bench.step(batch("b"))
    with pytest.raises(NotReady):
        bench.worker.control(lambda: None)
    assert bench.admission.num_requests == 0


def test_waiting_for_those_who_read_the_device_is_no_work_of_a_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes meanwhile is joined, and nothing is refused later on as if jobs took so long."""
    guests, waits = bench.worker.guests, threading.Event()
    begin_turn = guests.begin_turn

    def seen() -> None:
        waits.set()
        begin_turn()

    monkeypatch.setattr(guests, "begin_turn", seen)
    assert guests.rest(False)
    steps = [bench.step(batch("a"))]
    waits.wait()
    bench.clock.advance(10)
    steps.append(bench.step(batch("b")))
    guests.release()
    for step in steps:
        step.result()
    assert bench.engine.joined == [["a", "b"]]
    with held(bench.worker):
        bench.step(batch("a"))
        bench.step(batch("b"), deadline=bench.clock.now + 1)
