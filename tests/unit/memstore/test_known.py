"""Rows that who asks has already are left out of a reply: those of the very epoch, and no others."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memstore.errors import MemstoreError
from memstore.types import KEY, Hits, KnownRows, RetrieveOptions, SequencePart, StepBatch
from tests.pairing import CPU, EVERYTHING, Pair, part

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMES = ("a", "nobody", "b")
ALL = RetrieveOptions(top_k=10, arrays=(KEY, "hidden", "token"))


@pytest.fixture(scope="module")
def wrapped() -> Pair:
    """Two sequences of two layers, one of which has lost its first rows."""
    pair = Pair(CPU)
    pair.append(part("a", 10), part("b", 4))
    pair.append(part("a", 3))
    return pair


def ask(pair: Pair, names: Sequence[str] = NAMES, options: RetrieveOptions = ALL) -> StepBatch:
    """A batch that retrieves for two queries of each sequence, and is found whatever is live."""
    parts = [SequencePart(sequence=name, num_rows=2) for name in names]
    return pair.batch(*parts, append=False, retrieve=options)


def hits_of(pair: Pair, *batches: StepBatch) -> list[Hits]:
    """What each batch found, all of them in one step."""
    hits = []
    for result in pair.memory.step(batches):
        assert not isinstance(result, MemstoreError)
        assert result.hits is not None
        hits.append(result.hits)
    return hits


def epochs_of(pair: Pair, batch: StepBatch) -> list[int]:
    """Those of the batch's sequences."""
    (result,) = pair.memory.step([batch])
    assert not isinstance(result, MemstoreError)
    return [sequence.epoch for sequence in result.sequences]


def assert_less(got: Hits, whole: Hits, left_out: Sequence[bool]) -> None:
    """`got` is `whole` without the arrays of some rows."""
    for name in ("row_splits", "positions", "index", "scores"):
        assert torch.equal(getattr(got, name), getattr(whole, name))
    expected = torch.tensor(left_out, dtype=torch.uint8)
    if not expected.any():
        assert got.left_out is None
    else:
        assert got.left_out is not None
        assert torch.equal(got.left_out, expected)
    assert list(got.arrays) == list(whole.arrays)
    for name, rows in whole.arrays.items():
        assert torch.equal(got.arrays[name], rows[expected == 0])


def groups_of(hits: Hits) -> list[int]:
    """The group of each row."""
    return torch.arange(len(hits.row_splits) - 1).repeat_interleave(hits.row_splits.diff()).tolist()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_is_known_is_left_out(wrapped: Pair, data: st.DataObject) -> None:
    batch = ask(wrapped)
    (whole,) = hits_of(wrapped, batch)
    epochs = epochs_of(wrapped, batch)
    known = tuple(
        KnownRows(
            epoch=data.draw(st.sampled_from([epochs[group % 3], epochs[group % 3] + 7, 0])),
            begin=data.draw(st.integers(0, 14) | st.just(2**62)),
            bits=data.draw(st.binary(max_size=3)),
        )
        for group in range(6)
    )
    (got,) = hits_of(wrapped, dataclasses.replace(batch, known=known))
    left_out = []
    for group, position in zip(groups_of(whole), whole.positions.tolist(), strict=True):
        bit = position - known[group].begin
        is_set = 0 <= bit < 8 * len(known[group].bits) and known[group].bits[bit // 8] >> bit % 8 & 1 == 1
        left_out.append(is_set and known[group].epoch == epochs[group % 3])
    assert_less(got, whole, left_out)


def test_batches_that_are_joined_have_their_own_known_rows(wrapped: Pair) -> None:
    first, second, third = ask(wrapped, ["b"]), ask(wrapped, ["a"]), ask(wrapped, ["nobody"])
    epoch = wrapped.look("a").sequences[0].epoch
    every = KnownRows(epoch, 0, b"\xff\xff")
    told = dataclasses.replace(second, known=(every, KnownRows(0, 0, b"")))
    whole = hits_of(wrapped, first, second, third)
    got = hits_of(wrapped, first, told, third)
    assert_less(got[0], whole[0], [False] * len(whole[0].positions))
    assert_less(got[1], whole[1], [group == 0 for group in groups_of(whole[1])])
    assert_less(got[2], whole[2], [])


def test_a_sequence_that_begins_anew_knows_nothing_of_before() -> None:
    pair = Pair(CPU)
    epoch = pair.append(part("a", 4)).sequences[0].epoch
    known = (KnownRows(epoch, 0, b"\x0f"),) * 2
    (before,) = hits_of(pair, dataclasses.replace(ask(pair, ["a"]), known=known))
    assert before.left_out is not None
    assert before.left_out.all()
    pair.append(part("a", 4, start=True))
    batch = ask(pair, ["a"])
    (whole,) = hits_of(pair, batch)
    (after,) = hits_of(pair, dataclasses.replace(batch, known=known))
    assert_less(after, whole, [False] * len(whole.positions))


def test_an_append_is_the_same_whatever_is_known() -> None:
    pair = Pair(CPU)
    epoch = pair.append(part("a", 4)).sequences[0].epoch
    batch = dataclasses.replace(pair.batch(part("a", 3)), known=(KnownRows(epoch, 0, b"\xff"),) * 2)
    (outcome,) = pair.memory.step([batch])
    assert not isinstance(outcome, MemstoreError)
    assert outcome.hits is not None
    assert all(len(rows) == 0 for rows in outcome.hits.arrays.values())
    pair.reference.step(batch)
    pair.compare_counts()
    pair.look("a")


def test_positions_alone_are_asked_for(wrapped: Pair) -> None:
    epoch = wrapped.look("b").sequences[0].epoch
    batch = ask(wrapped, ["b"], dataclasses.replace(EVERYTHING, arrays=()))
    (got,) = hits_of(wrapped, dataclasses.replace(batch, known=(KnownRows(epoch, 0, b"\xff"),) * 2))
    assert got.left_out is None
    assert got.arrays == {}
