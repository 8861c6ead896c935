"""Appends that are sent again, of several writers and epochs: against the oracle, which applies each once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from memstore.errors import AlreadyExists, EpochChanged, PositionExpired, SequenceGap
from tests.pairing import SPEC, Pair, part, replace

if TYPE_CHECKING:
    from memstore.types import SequencePart


def test_a_resend_is_answered_again_and_not_applied(pair: Pair) -> None:
    steps = [pair.batch(part("a", 3, seq=seq), writer="w", fingerprints=(seq,)) for seq in range(4)]
    first = [pair.step(step) for step in steps]
    for step, result in zip(steps, first, strict=True):
        again = pair.step(step)
        assert again.sequences[0].is_replay
        assert again.sequences[0].first_position == result.sequences[0].first_position
        assert again.sequences[0].as_of == result.sequences[0].as_of
    assert pair.memory.counts().appended_rows == 12 * SPEC.num_layers


def test_a_resend_sees_the_rows_of_its_first_time_as_far_as_they_are_left() -> None:
    pair = Pair(torch.device("cpu"))
    pair.append(part("a", 9, seq=0), writer="w")
    second = pair.batch(part("a", 3, seq=1), writer="w")
    assert pair.step(second).sequences[0].live_begin == 0
    again = pair.step(second).sequences[0]
    assert (again.live_begin, again.as_of) == (2, 9)


def test_a_batch_may_mix_resent_and_new_parts(pair: Pair) -> None:
    pair.append(part("a", 2, seq=0), part("b", 2, seq=0), writer="w")
    result = pair.append(part("a", 2, seq=0), part("b", 4, seq=1), part("c", 1, seq=0), writer="w")
    assert [each.is_replay for each in result.sequences] == [True, False, False]
    pair.look("a", "b", "c")


@pytest.mark.parametrize("sent", [part("a", 1, seq=0), part("a", 2, seq=0)])
def test_a_seq_cannot_be_used_for_other_rows(pair: Pair, sent: SequencePart) -> None:
    pair.append(part("a", 2, seq=0), writer="w", fingerprints=(1,))
    with pytest.raises(AlreadyExists):
        pair.append(sent, writer="w", fingerprints=(2,))


def test_a_gap_names_what_is_expected(pair: Pair) -> None:
    pair.append(part("a", 1, seq=0), writer="w")
    with pytest.raises(SequenceGap) as raised:
        pair.append(part("a", 1, seq=2), writer="w")
    assert raised.value.metadata["expected_seq"] == "1"
    with pytest.raises(SequenceGap):
        pair.append(part("unknown", 1, seq=1), writer="w")
    assert pair.look("a", "unknown").sequences[1].epoch == 0


def test_writers_count_for_themselves(pair: Pair) -> None:
    pair.append(part("a", 1, seq=0), writer="w")
    pair.append(part("a", 2, seq=0), writer="v")
    pair.append(part("a", 1, seq=1), writer="w")
    assert pair.look("a").sequences[0].as_of == 4


def test_another_epoch_begins_at_seq_0_again(pair: Pair) -> None:
    epoch = pair.append(part("a", 1, seq=0), writer="w").sequences[0].epoch
    pair.append(part("a", 1, seq=1, epoch=epoch), writer="w")
    assert pair.memory.reset(["a"], False) == pair.reference.reset(["a"], False)
    with pytest.raises(EpochChanged) as raised:
        pair.append(part("a", 1, seq=2, epoch=epoch), writer="w")
    now = int(raised.value.metadata["epoch"])
    assert pair.append(part("a", 1, seq=0, epoch=now), writer="w").sequences[0].first_position == 0


def test_an_epoch_is_asked_of_a_sequence_that_does_not_exist(pair: Pair) -> None:
    with pytest.raises(EpochChanged):
        pair.append(part("a", 1, epoch=9))
    with pytest.raises(EpochChanged):
        pair.step(pair.batch(part("a", 1, epoch=9), append=False))


def test_a_resent_start_does_not_begin_another_epoch(pair: Pair) -> None:
    old = pair.append(part("a", 3)).sequences[0].epoch
    start = pair.batch(part("a", 2, seq=0, epoch=old, start=True), writer="w", fingerprints=(5,))
    new = pair.step(start).sequences[0].epoch
    pair.append(part("a", 1, seq=1, epoch=new), writer="w")
    again = pair.step(start).sequences[0]
    assert (again.is_replay, again.epoch) == (True, new)
    assert pair.look("a").sequences[0].as_of == 3


def test_equal_documents_one_after_the_other_both_begin_anew(pair: Pair) -> None:
    start = pair.batch(part("a", 2, seq=0, start=True), writer="w", fingerprints=(5,))
    first = pair.step(start).sequences[0].epoch
    pair.append(part("a", 4, seq=1), writer="w")
    again = pair.step(start).sequences[0]
    assert not again.is_replay
    assert again.epoch != first
    assert pair.look("a").sequences[0].as_of == 2


def test_a_start_is_numbered_from_0(pair: Pair) -> None:
    pair.append(part("a", 1, seq=0), writer="w")
    with pytest.raises(SequenceGap):
        pair.append(part("a", 1, seq=1, start=True), writer="w")
    assert pair.look("a").sequences[0].as_of == 1


def test_the_last_256_replies_and_64_writers_are_remembered() -> None:
    pair = Pair(torch.device("cpu"), replace(SPEC, payloads=(), num_layers=1))
    steps = [pair.batch(part("a", 1, seq=seq), writer="w", retrieve=None, fingerprints=(seq,)) for seq in range(258)]
    for step in steps:
        pair.step(step)
    for step in steps[2:]:
        assert pair.step(step).sequences[0].is_replay
    with pytest.raises(PositionExpired):
        pair.step(steps[1])
    for writer in range(63):
        pair.step(pair.batch(part("a", 1), writer=f"w{writer}", retrieve=None))
    assert pair.step(steps[257]).sequences[0].is_replay
    pair.step(pair.batch(part("a", 1), writer="one too many", retrieve=None))
    with pytest.raises(SequenceGap):
        pair.step(steps[257])
