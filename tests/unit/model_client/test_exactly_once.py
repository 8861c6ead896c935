"""Appends through a bad network: each row once at most, in order, without gaps; what was promised is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memstore.embedded import Embedded
from model_client import MemoryClient, Retrieval, errors
from tests.faulty import FakeClock, Fault, FaultyTransport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model_client import PendingStep, Session

CAPACITY = 64
EVERYTHING = Retrieval(top_k=CAPACITY)
DEADLINE_S = 0.01  # shorter than the first pause, so that nothing is tried twice within a step


@pytest.fixture(scope="module")
def server() -> Iterator[Embedded]:
    embedded = Embedded("cpu", capacity_bytes=1 << 24)
    yield embedded
    embedded.close()


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

    def start(self, count: int = 1, *, is_start: bool = False) -> tuple[list[int], PendingStep]:
        """Begins to append the next rows to the first sequence."""
        numbers, keys = self.rows(count)
        payloads = {"twice": (keys * 2).int()}
        counts = [count] + [0] * (len(self.session.sequences) - 1)
        pending = self.session.start_step(
            keys, counts, retrieve=EVERYTHING, append=True, payloads=payloads, start_of_sequence=is_start
        )
        return numbers, pending

    def append(self, count: int = 1, *faults: Fault, is_start: bool = False) -> list[int]:
        """Appends through these faults, and expects it to succeed."""
        self.network.script = list(faults)
        numbers, pending = self.start(count, is_start=is_start)
        pending.result()
        return numbers

    def fail(self, count: int, *faults: Fault, is_start: bool = False) -> list[int]:
        """Appends through these faults, and expects that no answer comes."""
        self.network.script = list(faults)
        numbers, pending = self.start(count, is_start=is_start)
        with pytest.raises((errors.Unavailable, errors.Late)):
            pending.result()
        return numbers

    def content(self, sequence: str = "a") -> list[int]:
        """The rows that a sequence holds, by position; positions are gap-free and payloads belong to their keys."""
        reader = self.clean.session("m", [sequence])
        retrieval = Retrieval(top_k=CAPACITY, arrays=("key", "twice"))
        hits = reader.retrieve(torch.zeros(1, 1), [1], retrieval).hits
        assert hits is not None
        positions = hits.positions.tolist()
        assert positions == list(range(positions[0], positions[0] + len(positions))) if positions else True
        assert torch.equal(hits.rows["twice"], (hits.rows["key"] * 2).int())
        return [int(value) for value in hits.rows["key"][:, 0].tolist()]


@pytest.fixture
def bench(server: Embedded) -> Bench:
    return Bench(server)


@pytest.mark.parametrize("fault", [Fault.REPLY_LOST, Fault.SILENCE])
def test_an_append_that_was_done_but_not_answered_is_not_done_again(bench: Bench, fault: Fault) -> None:
    first = bench.append(2)
    lost = bench.fail(3, fault)
    last = bench.append(1)
    assert bench.content() == first + lost + last
    assert bench.client.stats.dropped_rows == 0


@pytest.mark.parametrize("fault", [Fault.REQUEST_LOST, Fault.FLOATING])
def test_an_append_that_never_arrived_goes_before_the_next_one(bench: Bench, fault: Fault) -> None:
    first = bench.append(2)
    lost = bench.fail(3, fault)
    last = bench.append(1)
    assert bench.content() == first + lost + last
    assert bench.client.stats.resends == 1
    while bench.network.held:
        bench.network.release()
    assert bench.content() == first + lost + last


def test_a_request_that_arrives_twice_is_applied_once(bench: Bench) -> None:
    rows = bench.append(2, Fault.TWICE) + bench.append(1, Fault.TWICE)
    assert bench.content() == rows


def test_within_the_deadline_a_broken_connection_is_tried_again(server: Embedded) -> None:
    bench = Bench(server, timeout_s=5.0)
    rows = bench.append(2, Fault.REPLY_LOST, Fault.REQUEST_LOST, Fault.REPLY_LOST)
    assert bench.content() == rows
    assert bench.client.stats.retries == 3
    assert bench.clock.pauses == [0.05, 0.1, 0.2]
    seqs = {(part.epoch, part.seq) for call in bench.network.calls for part in call.sequences}  # type: ignore[attr-defined]
    assert seqs == {(0, 0)}


def test_a_step_behind_an_unknown_outcome_fails_and_appends_nothing(bench: Bench) -> None:
    first = bench.append(1)
    lost = bench.fail(2, Fault.REQUEST_LOST)
    bench.fail(3, Fault.REQUEST_LOST)  # it is the lost one that is asked for again
    last = bench.append(1)
    assert bench.content() == first + lost + last
    assert bench.client.stats.dropped_rows == 3


def test_a_late_answer_is_taken_note_of_without_asking_again(bench: Bench) -> None:
    first = bench.append(1)
    late = bench.fail(2, Fault.HELD)
    bench.network.release()
    last = bench.append(1)
    assert bench.content() == first + late + last
    assert bench.client.stats.resends == 0
    assert len(bench.network.calls) == 3


def test_two_appends_under_way_that_arrive_in_the_wrong_order(bench: Bench) -> None:
    rows = bench.append(1)
    bench.network.script = [Fault.HELD, Fault.HELD]
    first, first_pending = bench.start(2)
    second, second_pending = bench.start(3)
    assert len(bench.network.held) == 2
    bench.network.release(1)  # refused: SequenceGap
    bench.network.release(0)
    second_pending.result()
    first_pending.result()
    assert bench.content() == rows + first + second


def test_the_second_of_two_is_awaited_first_and_both_were_lost(server: Embedded) -> None:
    bench = Bench(server, timeout_s=5.0)
    rows = bench.append(1)
    bench.network.script = [Fault.REQUEST_LOST, Fault.HELD]
    first, first_pending = bench.start(2)
    second, second_pending = bench.start(3)
    bench.network.script = [Fault.REPLY_LOST]
    while bench.network.held:
        bench.network.release()
    second_pending.result()
    first_pending.result()
    assert bench.content() == rows + first + second


def test_a_third_step_waits_and_a_fourth_is_refused(bench: Bench) -> None:
    rows = bench.append(1)
    bench.network.script = [Fault.HELD, Fault.HELD]
    pendings = [bench.start(1) for _ in range(4)]
    assert len(bench.network.held) == 2
    with pytest.raises(errors.Overloaded):
        pendings[3][1].result()
    bench.network.release()
    bench.network.release()
    pendings[2][1].result()
    assert bench.content() == rows + pendings[0][0] + pendings[1][0] + pendings[2][0]
    assert pendings[0][1].done()
    assert bench.client.stats.dropped_rows == 1


def test_a_waiting_step_that_nobody_holds_makes_room(bench: Bench) -> None:
    rows = bench.append(1)
    bench.network.script = [Fault.HELD, Fault.HELD]
    kept = [bench.start(1) for _ in range(2)]
    bench.start(1)
    bench.network.release()
    bench.network.release()
    last = bench.append(1)
    assert bench.content() == rows + kept[0][0] + kept[1][0] + last
    assert bench.client.stats.dropped_rows == 1


def test_a_refused_append_leaves_no_hole(bench: Bench) -> None:
    rows = bench.append(1)
    bad = torch.full((1, 1), float("nan"))
    with pytest.raises(errors.InvalidRequest):
        bench.session.append(bad, [1], payloads={"twice": torch.zeros(1, 1, dtype=torch.int32)})
    rows += bench.append(1)
    assert bench.content() == rows
    assert bench.client.stats.resends == 0


def test_a_refused_append_before_one_that_has_left_is_filled(bench: Bench) -> None:
    rows = bench.append(1)
    bench.network.script = [Fault.HELD, Fault.HELD]
    bad = torch.full((1, 1), float("nan"))
    refused = bench.session.start_step(
        bad, [1], retrieve=None, append=True, payloads={"twice": torch.zeros(1, 1, dtype=torch.int32)}
    )
    good, pending = bench.start(2)
    bench.network.release()
    bench.network.release()
    with pytest.raises(errors.InvalidRequest):
        refused.result()
    pending.result()
    assert bench.content() == rows + good
    assert bench.append(1) == bench.content()[-1:]


def test_rows_lost_by_the_server_are_begun_again_at_position_zero(bench: Bench) -> None:
    bench.append(3)
    bench.clean.reset("m", ["a"])
    numbers, pending = bench.start(2)
    result = pending.result()
    assert result.sequences[0].first_position == 0
    assert bench.content() == numbers
    assert bench.client.stats.lost_epochs == 1


def test_two_under_way_when_the_sequence_is_lost_keep_their_order(bench: Bench) -> None:
    bench.append(3)
    bench.network.script = [Fault.HELD, Fault.HELD]
    first, first_pending = bench.start(1)
    second, second_pending = bench.start(2)
    bench.clean.reset("m", ["a"], release=True)
    bench.network.release()
    bench.network.release()
    second_pending.result()
    first_pending.result()
    assert bench.content() == first + second


@pytest.mark.parametrize("fault", [Fault.REPLY_LOST, Fault.REQUEST_LOST, Fault.SILENCE, Fault.FLOATING])
def test_a_start_whose_outcome_is_not_known_happens_once(bench: Bench, fault: Fault) -> None:
    bench.append(2)
    begun = bench.fail(3, fault, is_start=True)
    begun += bench.append(1)
    while bench.network.held:
        bench.network.release()
    assert bench.content() == begun
    begun += bench.append(1)
    assert bench.content() == begun


def test_a_new_start_gives_up_what_it_would_wipe(bench: Bench) -> None:
    bench.append(1)
    bench.fail(2, Fault.REQUEST_LOST)
    begun = bench.append(3, is_start=True)
    assert bench.content() == begun
    assert bench.client.stats.resends == 0


def test_reset_gives_up_what_failed_and_begins_anew(bench: Bench) -> None:
    bench.append(1)
    bench.fail(2, Fault.REQUEST_LOST)
    bench.session.reset()
    assert bench.content() == []
    rows = bench.append(2)
    assert bench.content() == rows


def test_fork_holds_what_was_under_way(bench: Bench) -> None:
    rows = bench.append(1)
    rows += bench.fail(2, Fault.REQUEST_LOST)
    reply = bench.session.fork("a", "b")
    assert reply.next_position == 3
    assert bench.content("b") == rows


def test_a_dropped_memory_forgets_what_was_under_way(server: Embedded) -> None:
    bench = Bench(server)
    bench.append(1)
    bench.fail(2, Fault.REPLY_LOST)
    bench.clean.drop_memory("m")
    with pytest.raises(errors.NotFound):
        bench.append(1)
    Bench(server)
    rows = bench.append(2)
    assert bench.content() == rows


def test_a_writer_that_the_server_forgot_goes_on_behind_its_rows(bench: Bench) -> None:
    rows = [number for _ in range(4) for number in bench.append(1)]
    for other in range(64):
        writer = bench.clean.session("m", ["a"])
        writer.append(
            torch.full((1, 1), -1.0 - other), [1], payloads={"twice": torch.full((1, 1), -2 - 2 * other).int()}
        )
    rows += bench.append(1) + bench.append(1)
    assert bench.content() == [*range(-3, -65, -1), *rows[-2:]]


def test_a_retrieval_after_an_unsettled_start_does_not_read_the_document_before(bench: Bench) -> None:
    bench.append(2)
    begun = bench.fail(3, Fault.REQUEST_LOST, is_start=True)
    hits = bench.session.retrieve(torch.zeros(1, 1), [1], EVERYTHING).hits
    assert hits is not None
    assert hits.rows["key"][:, 0].int().tolist() == begun


def test_the_outcome_of_a_done_append_settled_by_another_is_still_given(bench: Bench) -> None:
    bench.append(1)
    bench.network.script = [Fault.REPLY_LOST]
    _, first = bench.start(2)
    bench.append(1)
    assert first.result().sequences[0].first_position == 1


FAULTS = st.lists(st.sampled_from(Fault), max_size=3)
COUNTS = st.tuples(st.integers(0, 2), st.integers(0, 2))
OPERATIONS: st.SearchStrategy[list[Any]] = st.lists(
    st.one_of(
        st.tuples(st.just("append"), COUNTS, FAULTS),
        st.tuples(st.just("start"), COUNTS, FAULTS),
        st.tuples(st.just("await"), COUNTS, st.just([])),
        st.tuples(st.just("release"), COUNTS, st.just([])),
        st.tuples(st.sampled_from(["retrieve", "start one", "reset by another", "drop by another"]), COUNTS, FAULTS),
    ),
    max_size=14,
)


class Model:
    """What is known of each sequence: the rows that were promised to be in it, if nothing has emptied it since."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.promised: dict[str, list[int]] = {"a": [], "b": []}
        self.pending: list[tuple[dict[str, list[int]], PendingStep]] = []

    def begin(self, counts: tuple[int, int], starts: tuple[bool, bool]) -> None:
        """Begins a step, and leaves it."""
        numbers = {}
        rows = []
        for name, count, is_start in zip("ab", counts, starts, strict=True):
            numbers[name], keys = self.bench.rows(count)
            rows.append(keys)
            if is_start:
                self.forget(name)
        keys = torch.cat(rows)
        pending = self.bench.session.start_step(
            keys,
            counts,
            retrieve=EVERYTHING,
            append=True,
            payloads={"twice": (keys * 2).int()},
            start_of_sequence=starts,
        )
        self.pending.append((numbers, pending))

    def forget(self, name: str) -> None:
        """From now on the sequence may be empty: nothing that was begun before is promised any more."""
        self.promised[name].clear()
        for numbers, _ in self.pending:
            numbers[name] = []

    def wait(self, index: int) -> None:
        """Asks for the result of one step; what it says it has done is promised."""
        numbers, pending = self.pending.pop(index)
        if _ignore(pending):
            for name, rows in numbers.items():
                self.promised[name] += rows

    def run(self, kind: str, counts: tuple[int, int], faults: list[Fault]) -> None:
        """One operation."""
        network = self.bench.network
        network.script = list(faults)
        if kind in ("append", "start", "start one"):
            self.begin(counts, (kind != "append", kind == "start"))
        elif kind == "await" and self.pending:
            self.wait(sum(counts) % len(self.pending))
        elif kind == "release" and network.held:
            network.release(sum(counts) % len(network.held))
        elif kind == "retrieve":
            _ignore(self.bench.session.start_step(torch.zeros(1, 1), [1, 0], retrieve=EVERYTHING, append=False))
        elif kind.endswith("by another"):
            name = "ab"[counts[0] % 2]
            self.bench.clean.reset("m", [name], release=kind.startswith("drop"))
            self.forget(name)


@settings(max_examples=200, deadline=None)
@given(operations=OPERATIONS, timeout_s=st.sampled_from([DEADLINE_S, 0.2]))
def test_whatever_the_network_does(
    server: Embedded, operations: list[tuple[str, tuple[int, int], list[Fault]]], timeout_s: float
) -> None:
    model = Model(Bench(server, sequences=("a", "b"), timeout_s=timeout_s))
    bench = model.bench
    for kind, counts, faults in operations:
        model.run(kind, counts, faults)
    bench.network.script.clear()
    while model.pending:
        model.wait(0)
    for _ in range(2):
        model.begin((1, 1), (False, False))
        model.wait(0)
    contents = {name: bench.content(name) for name in "ab"}
    for name, content in contents.items():
        assert content == sorted(set(content)), "a row twice, or out of order"
        assert set(model.promised[name]) <= set(content), "a row that was promised is missing"
        assert model.promised[name], "the session does not go on"
    while bench.network.held:
        bench.network.release(len(bench.network.held) - 1)
    assert {name: bench.content(name) for name in "ab"} == contents, "a request that arrived too late was done"


def _ignore(pending: PendingStep) -> bool:
    try:
        pending.result()
    except errors.MemstoreClientError:
        return False
    return True
