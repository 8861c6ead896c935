"""Lending at the level of the engine: two memories over one slab, one of which holds a lease."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest
import torch

from memstore.errors import AlreadyExists, Corrupt, MemstoreError, NotFound, NotReady, QuotaExceeded
from memstore.lender import LentState, state_of
from memstore.region import map_region
from memstore.slab import Slab
from memstore.types import SequencePart, SpillSpec, StepBatch, StepResult
from memstore.wire import found_states, leave_states
from tests.lending import CPU, EVERYTHING, SPEC, Lent, append, batch, content, counts

if TYPE_CHECKING:
    from memstore.appending import StagedAppend


@pytest.fixture
def lent() -> Lent:
    return Lent()


def test_what_the_holder_appends_the_server_reads_and_counts(lent: Lent) -> None:
    append(lent.server, "a", [1, 2])
    lent.lend("a", "b")
    assert counts(lent.server) == (1, 4, 4, 0), "a place that is only kept is no sequence"
    append(lent.holder, "a", [3], seq=1)
    append(lent.holder, "b", list(range(10)))
    assert content(lent.server, "a") == {0: 1, 1: 2, 2: 3}
    assert content(lent.server, "b") == {position: position for position in range(2, 10)}
    assert counts(lent.server) == (2, 22, 26, 4)
    append(lent.holder, "b", [7], start=True)
    assert content(lent.server, "b") == {0: 7}
    assert counts(lent.server) == (2, 8, 28, 20)


def test_a_gpu_has_written_what_is_lent(lent: Lent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that holds it cannot wait for the server's stream."""
    lender, leases = lent.server.lender, []
    stream = Mock(**{"synchronize.side_effect": lambda: leases.append(len(lender))})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    gpu_slab = SimpleNamespace(device=torch.device("cuda", 0), capacity=SPEC.capacity, num_layers=SPEC.num_layers)
    monkeypatch.setattr(lender, "_slab", gpu_slab)
    lender.lend(["a"], "w", lent.recalled.append, lambda: None)
    assert leases == [0]


def test_what_was_given_back_is_the_servers_again(lent: Lent) -> None:
    lease = lent.lend("a", "b")
    append(lent.holder, "a", [1, 2])
    before = counts(lent.server)
    lent.give_back(lease)
    assert counts(lent.server) == before == (1, 4, 4, 0)
    assert lent.num_ended == 1
    assert not lent.block.is_held
    assert append(lent.server, "a", [3], seq=1).sequences[0].first_position == 2
    append(lent.server, "b", [1])
    append(lent.server, "c", [1], writer="")
    assert content(lent.server, "a") == {0: 1, 1: 2, 2: 3}


def test_answers_go_with_the_lease_both_ways(lent: Lent) -> None:
    append(lent.server, "a", [1, 2])
    lease = lent.lend("a")
    again = append(lent.holder, "a", [1, 2]).sequences[0]
    assert (again.is_replay, again.first_position) == (True, 0)
    with pytest.raises(AlreadyExists):
        append(lent.holder, "a", [5, 6])
    append(lent.holder, "a", [3], seq=1)
    lent.give_back(lease)
    again = append(lent.server, "a", [3], seq=1).sequences[0]
    assert (again.is_replay, again.first_position) == (True, 2)
    assert content(lent.server, "a") == {0: 1, 1: 2, 2: 3}


def test_others_cannot_change_what_is_lent_and_the_lease_is_recalled_once(lent: Lent) -> None:
    lease = lent.lend("a", "b")
    append(lent.holder, "a", [1])
    with pytest.raises(NotReady):
        append(lent.server, "a", [9], seq=1)
    assert lent.recalled == [], "its own writer comes too late, or has lost its way"
    for act in (
        lambda: append(lent.server, "b", [9], writer="x"),
        lambda: append(lent.server, "a", [], writer="x", start=True),
        lambda: lent.server.reset(["c", "a"], False),
        lambda: lent.server.reset(["b"], True),
        lambda: lent.server.fork("a", "c", None, 0),
        lambda: lent.server.fork("c", "b", None, 0),
    ):
        with pytest.raises(NotReady):
            act()
    assert lent.recalled == [lease.number]
    with pytest.raises(NotReady):
        lent.server.lender.lend(["c", "b"], "x", lent.recalled.append, lambda: None)
    assert content(lent.holder, "a") == {0: 1}
    append(lent.server, "c", [4])


def test_places_that_are_kept_are_recalled_when_they_are_needed(lent: Lent) -> None:
    lease = lent.lend("a", "b", "c")
    with pytest.raises(QuotaExceeded):
        lent.server.lender.lend(["d"], "x", lent.recalled.append, lambda: None)
    with pytest.raises(NotReady):
        append(lent.server, "d", [1])
    assert lent.recalled == [lease.number]
    for name in "abc":
        append(lent.holder, name, [1])
    with pytest.raises(QuotaExceeded):
        append(lent.server, "d", [1])


@pytest.mark.parametrize("numbers", [[8, 9], list(range(8, 14)), list(range(8, 19)), list(range(8, 40))])
@pytest.mark.parametrize("is_start", [False, True])
def test_a_holder_that_dies_while_it_writes_leaves_what_was_published(
    lent: Lent, monkeypatch: pytest.MonkeyPatch, numbers: list[int], is_start: bool
) -> None:
    """It dies with some of its rows written over old ones, and none of them counted."""

    class Death(Exception):
        pass

    def write(slab: Slab, staged: StagedAppend) -> None:
        for tensor in (slab.keys, slab.payloads["twice"]):
            tensor.flatten(0, 2)[staged.cells] = -1
        raise Death

    lease = lent.lend("a", "b")
    append(lent.holder, "a", list(range(8)))
    append(lent.holder, "b", [5])
    monkeypatch.setattr("memstore.memory.write", write)
    with pytest.raises(Death):
        append(lent.holder, "a", numbers, seq=0 if is_start else 1, start=is_start)
    monkeypatch.undo()
    while_it_dies = content(lent.server, "a")
    lent.server.lender.take_back(lease)
    kept = content(lent.server, "a")
    expected = {} if is_start else {position: position for position in range(len(numbers), 8)}
    assert kept == while_it_dies == expected
    assert content(lent.server, "b") == {0: 5}
    assert counts(lent.server)[1] == 2 * (len(kept) + 1)
    result = append(lent.server, "a", [70], writer="x").sequences[0]
    first = result.first_position
    assert first == (0 if is_start and numbers else 8)
    expected = {position: number for position, number in kept.items() if position > first - 8}
    assert content(lent.server, "a") == {**expected, first: 70}


def test_a_reader_that_was_overtaken_by_the_holder_reads_again(lent: Lent, monkeypatch: pytest.MonkeyPatch) -> None:
    lent.lend("a")
    append(lent.holder, "a", list(range(8)))
    retrieve = type(lent.server._index).retrieve

    def overtaken(*arguments: object) -> object:
        monkeypatch.undo()
        append(lent.holder, "a", [8], seq=1)
        return retrieve(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(type(lent.server._index), "retrieve", overtaken)
    with pytest.raises(NotReady):
        content(lent.server, "a")
    assert content(lent.server, "a") == {position: position for position in range(1, 9)}


def test_a_prefix_that_has_left_a_lent_sequence_is_empty(lent: Lent) -> None:
    lent.lend("a")
    append(lent.holder, "a", list(range(20)))
    assert content(lent.server, "a", as_of=14) == {12: 12, 13: 13}
    assert content(lent.server, "a", as_of=5) == content(lent.server, "a", as_of=12) == {}


def test_a_holder_that_writes_nonsense_loses_the_sequence(lent: Lent) -> None:
    append(lent.server, "a", [1, 2])
    lease = lent.lend("a", "b")
    append(lent.holder, "b", [3])
    table = lent.block.table()
    table[0, 1] = -5
    lent.block.publish(table)
    with pytest.raises(MemstoreError):
        content(lent.server, "a")
    lent.server.lender.take_back(lease)
    assert content(lent.server, "a") == {}
    assert content(lent.server, "b") == {0: 3}
    assert counts(lent.server)[:2] == (2, 2)


def test_nonsense_of_a_holder_is_counted_as_what_is_lost_and_asked_back(lent: Lent) -> None:
    append(lent.server, "a", [1, 2])
    append(lent.server, "c", [9])
    lease = lent.lend("a", "b")
    append(lent.holder, "b", [3])
    table = lent.block.table()
    table[0, 1] = -5
    lent.block.publish(table)
    assert counts(lent.server) == (3, 4, 8, 4)
    assert lent.recalled == [lease.number]
    lent.server.lender.take_back(lease)
    assert counts(lent.server) == (3, 4, 8, 4)


def test_nonsense_of_a_holder_is_no_error_of_those_who_want_a_place(lent: Lent) -> None:
    lease = lent.lend("a", *(f"new{number}" for number in range(lent.server.spec.max_sequences - 1)))
    append(lent.holder, "a", [3])
    for number in range(lent.server.spec.max_sequences - 1):
        append(lent.holder, f"new{number}", [number])
    table = lent.block.table()
    table[0, 1] = -5
    lent.block.publish(table)
    with pytest.raises(NotReady, match="asked for them"):
        append(lent.server, "other", [1])
    assert lent.recalled == [lease.number]


@pytest.mark.parametrize("changes", [{"as_of": 4}, {"first_position": 3}, {"num_rows": 4}, {"as_of": 1 << 50}])
def test_an_answer_about_what_was_never_published_is_refused(lent: Lent, changes: dict[str, int]) -> None:
    lent.lend("a")
    append(lent.holder, "a", [1, 2, 3])
    ((name, sequence),) = lent.table.lent()
    writer = sequence.writers["w"]
    writer.replies[0] = writer.replies[0]._replace(**changes)
    leave_states(lent.block, [state_of(name, sequence, ["w"])])
    with pytest.raises(Corrupt):
        found_states(lent.block)


def test_answers_that_do_not_fit_what_was_published_are_left(lent: Lent) -> None:
    lease = lent.lend("a")
    append(lent.holder, "a", [1, 2, 3])
    ((name, sequence),) = lent.table.lent()
    leave_states(lent.block, [replace(state_of(name, sequence, ["w"]), next_position=9)])
    lent.server.lender.take_back(lease, found_states(lease.block))
    assert content(lent.server, "a") == {0: 1, 1: 2, 2: 3}
    assert not append(lent.server, "a", [4]).sequences[0].is_replay


def test_nonsense_that_comes_late_spoils_no_append_beside_it(lent: Lent) -> None:
    append(lent.server, "a", [1])
    lent.lend("a")
    part = SequencePart(sequence="a", num_rows=1)
    look = StepBatch(parts=(part,), layers=(0, 1), keys=torch.zeros(2, 1, 2), retrieve=EVERYTHING)

    def carry(at: int, hits: object) -> None:
        table = lent.block.table()
        table[0, 1] = -5
        lent.block.publish(table)

    _, beside = lent.server.step([look, batch("c", [4])], carry)
    assert isinstance(beside, StepResult)
    assert content(lent.server, "c") == {0: 4}


def test_a_dropped_memory_ends_its_leases(lent: Lent) -> None:
    lease = lent.lend("a")
    lent.server.free()
    assert not lent.block.is_held
    assert lent.num_ended == 1
    assert lease not in lent.server.lender
    with pytest.raises(NotFound):
        lent.server.lender.lend(["a"], "w", lent.recalled.append, lambda: None)


def test_sequences_of_a_dead_server_are_found_again(lent: Lent) -> None:
    lease = lent.lend("a", "b", "c")
    append(lent.holder, "a", list(range(11)))
    append(lent.holder, "b", [5])
    leave_states(lent.block, [state_of(name, each, each.writers) for name, each in lent.table.lent()])
    states = found_states(lent.block)
    successor = Lent()
    append(successor.server, "b", [1, 2, 3])
    assert successor.server.region is not None
    assert lent.server.region is not None
    old = Slab(SPEC, CPU, region=map_region(lent.server.region.descriptor, lent.server.reserved_bytes, CPU))
    assert successor.server.lender.restore(old, states) == 1
    assert content(successor.server, "a") == {position: position for position in range(3, 11)}
    assert content(successor.server, "b") == {0: 1, 1: 2, 2: 3}, "it has begun anew, and stays so"
    again = append(successor.server, "a", list(range(11)), seq=0).sequences[0]
    assert (again.is_replay, again.epoch) == (True, states[0].epoch)
    assert counts(successor.server)[:2] == (2, 22)
    assert lease.number != 0


def test_what_is_found_again_has_room_made_for_it_where_sequences_can_be_spilled(lent: Lent) -> None:
    lent.lend("a", "b", "c")
    for number, name in enumerate("abc"):
        append(lent.holder, name, [number])
    states = [state_of(name, each, each.writers) for name, each in lent.table.lent()]
    successor = Lent(replace(SPEC, spill=SpillSpec(max_sequences=2, host_sequences=2)))
    for number, name in enumerate("xyz", start=7):
        append(successor.server, name, [number])
    assert successor.server.lender.restore(lent.holder._slab, states) == 2, "as many as the memory may have"
    for number, name in enumerate("ab"):
        assert content(successor.server, name) == {0: number}
        assert append(successor.server, name, [number]).sequences[0].is_replay
    for number, name in enumerate("xyz", start=7):
        assert content(successor.server, name) == {0: number}
    assert counts(successor.server)[:2] == (5, 10)


def test_where_nothing_may_leave_what_is_found_again_is_left_out(lent: Lent) -> None:
    lent.lend("a")
    append(lent.holder, "a", [1])
    states = [state_of(name, each, each.writers) for name, each in lent.table.lent()]
    successor = Lent(replace(SPEC, spill=SpillSpec(max_sequences=2, host_sequences=2)))
    for name in "xyz":
        append(successor.server, name, [1])
    successor.server.pin(["x", "y", "z"], True)
    assert successor.server.lender.restore(lent.holder._slab, states) == 0
    assert counts(successor.server)[:2] == (3, 6)


def test_no_more_is_found_again_than_there_is_room_for(lent: Lent) -> None:
    lent.lend("a", "b")
    append(lent.holder, "a", [1])
    append(lent.holder, "b", [2])
    successor = Lent()
    for name in "xy":
        append(successor.server, name, [1])
    states = [state_of(name, each, ()) for name, each in lent.table.lent()]
    assert all(isinstance(state, LentState) for state in states)
    assert successor.server.lender.restore(lent.holder._slab, states) == 1
    assert content(successor.server, "a") == {0: 1}
