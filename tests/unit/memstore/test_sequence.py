"""Sequences, their writers and their places."""

from __future__ import annotations

import pytest

from memstore.errors import AlreadyExists, EpochChanged, PositionExpired, QuotaExceeded, SequenceGap
from memstore.sequence import MAX_WRITERS, REPLAY_WINDOW, Reply, Sequence, SequenceTable, plan_part
from memstore.types import SequencePart


def reply(first_position: int = 0, begun_from: int | None = None) -> Reply:
    return Reply(num_rows=1, fingerprint=5, as_of=first_position, first_position=first_position, begun_from=begun_from)


def sent(seq: int, *, num_rows: int = 1, epoch: int = 0, start: bool = False) -> SequencePart:
    return SequencePart(sequence="s", num_rows=num_rows, seq=seq, epoch=epoch, start_of_sequence=start)


def appended_to(num_rows: int) -> Sequence:
    """A sequence of epoch 7 with rows of one append."""
    sequence = Sequence(0, 7, num_rows)
    sequence.remember("w", reply())
    return sequence


def test_places_are_given_lowest_first_and_given_again() -> None:
    table = SequenceTable(3)
    assert [table.create(name, 1).place for name in "abc"] == [0, 1, 2]
    with pytest.raises(QuotaExceeded):
        table.create("d", 1)
    table.remove("c")
    table.remove("a")
    assert table.num_free == 2
    assert [table.create(name, 1).place for name in "de"] == [0, 2]
    assert len(table) == 3
    assert table.get("a") is None
    assert table["b"].place == 1


def test_the_places_of_the_next_new_sequences_are_known_before() -> None:
    table = SequenceTable(5)
    for name in "abcde":
        table.create(name, 1)
    for name in "bdac":
        table.remove(name)
    assert list(table.places_of_new(["w", "x", "y", "z"])) == [0, 1, 2, 3]
    assert [table.create(name, 1).place for name in "wxyz"] == [0, 1, 2, 3]


def test_a_sequence_keeps_what_its_ring_holds_but_nothing_below_its_floor() -> None:
    sequence = Sequence(place=0, epoch=1, next_position=20, floor=15)
    assert sequence.begin(10) == 15
    sequence.next_position = 30
    assert sequence.begin(10) == 20
    sequence.remember("w", reply())
    sequence.restart(2)
    assert (sequence.begin(10), sequence.next_position, sequence.epoch, len(sequence.writers)) == (0, 0, 2, 0)


def test_only_the_newest_replies_are_kept() -> None:
    sequence = Sequence(place=0, epoch=1)
    for seq in range(REPLAY_WINDOW + 3):
        sequence.remember("w", reply(seq))
    for seq in range(3, REPLAY_WINDOW + 3):
        plan = plan_part(sent(seq), sequence, 1000, writer="w", fingerprint=5)
        assert (plan.is_replay, plan.first_position) == (True, seq)
    with pytest.raises(PositionExpired) as raised:
        plan_part(sent(2), sequence, 1000, writer="w", fingerprint=5)
    assert raised.value.metadata["expected_seq"] == str(REPLAY_WINDOW + 3)


def test_the_writer_that_appended_longest_ago_is_forgotten() -> None:
    sequence = Sequence(place=0, epoch=1)
    for number in range(MAX_WRITERS):
        sequence.remember(f"w{number}", reply())
    sequence.remember("w0", reply())
    sequence.remember("another", reply())
    assert len(sequence.writers) == MAX_WRITERS
    assert plan_part(sent(1), sequence, 10, writer="w0", fingerprint=5).is_replay
    with pytest.raises(SequenceGap):
        plan_part(sent(1), sequence, 10, writer="w1", fingerprint=5)


def test_the_next_append_of_a_writer_goes_on_where_the_sequence_ends() -> None:
    sequence = appended_to(4)
    plan = plan_part(sent(1, epoch=7), sequence, 10, writer="w", fingerprint=5)
    assert (plan.begin, plan.as_of, plan.first_position, plan.is_replay) == (0, 4, 4, False)
    wrapped = plan_part(sent(1, epoch=7), sequence, 3, writer="w", fingerprint=5)
    assert (wrapped.begin, wrapped.as_of) == (1, 4)


def test_the_next_append_in_another_epoch_is_refused() -> None:
    with pytest.raises(EpochChanged):
        plan_part(sent(1, epoch=6), appended_to(4), 10, writer="w", fingerprint=5)


def test_the_next_append_sees_no_more_than_it_asks_for() -> None:
    earlier = SequencePart(sequence="a", num_rows=1, seq=1, epoch=7, as_of=2)
    plan = plan_part(earlier, appended_to(4), 10, writer="w", fingerprint=5)
    assert (plan.as_of, plan.first_position) == (2, 4)
    later = SequencePart(sequence="a", num_rows=1, seq=1, epoch=7, as_of=5)
    with pytest.raises(PositionExpired):
        plan_part(later, appended_to(4), 10, writer="w", fingerprint=5)


def test_a_start_is_number_0_of_its_epoch_whatever_would_be_next() -> None:
    with pytest.raises(SequenceGap):
        plan_part(sent(1, epoch=7, start=True), appended_to(4), 10, writer="w", fingerprint=5)


@pytest.mark.parametrize(("num_rows", "fingerprint"), [(2, 5), (1, 6)])
def test_a_seq_with_other_rows_is_refused(num_rows: int, fingerprint: int) -> None:
    sequence = Sequence(place=0, epoch=1)
    sequence.remember("w", reply())
    with pytest.raises(AlreadyExists):
        plan_part(sent(0, num_rows=num_rows), sequence, 10, writer="w", fingerprint=fingerprint)


def test_an_epoch_that_is_not_the_present_one_is_refused_even_for_a_known_seq() -> None:
    sequence = Sequence(place=0, epoch=7)
    sequence.remember("w", reply())
    with pytest.raises(EpochChanged) as raised:
        plan_part(sent(0, epoch=6), sequence, 10, writer="w", fingerprint=5)
    assert raised.value.metadata["epoch"] == "7"


def test_a_start_is_a_resend_only_of_what_began_this_epoch() -> None:
    sequence = Sequence(place=0, epoch=7, next_position=1)
    sequence.remember("w", reply(begun_from=6))
    again = plan_part(sent(0, epoch=6, start=True), sequence, 10, writer="w", fingerprint=5)
    assert again.is_replay
    anew = plan_part(sent(0, epoch=7, start=True), sequence, 10, writer="w", fingerprint=5)
    assert (anew.is_replay, anew.as_of, anew.first_position) == (False, 0, 0)
    with pytest.raises(EpochChanged):
        plan_part(sent(0, epoch=5, start=True), sequence, 10, writer="w", fingerprint=5)


def test_unnumbered_appends_are_never_resends() -> None:
    sequence = Sequence(place=0, epoch=7, next_position=4)
    for writer in ("", None):
        plan = plan_part(sent(99), sequence, 10, writer=writer, fingerprint=5)
        assert (plan.is_replay, plan.first_position) == (False, 4)
