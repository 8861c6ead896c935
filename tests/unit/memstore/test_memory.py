"""Memory against the oracle: the same steps, the same answers."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import pytest
import torch

from memstore.errors import (
    AlreadyExists,
    DeviceMemoryFull,
    EpochChanged,
    InvalidRequest,
    MemstoreError,
    NotFound,
    PositionExpired,
    QuotaExceeded,
    SequenceGap,
)
from memstore.memory import Memory
from memstore.types import (
    IndexKind,
    IndexSettings,
    MemorySpec,
    Metric,
    RetrieveOptions,
    SequencePart,
    StepBatch,
    StepResult,
)
from tests.comparing import assert_same
from tests.pairing import CPU, DIM, SPEC, Pair, part, replace

if TYPE_CHECKING:
    from collections.abc import Sequence


def test_what_is_appended_is_found_by_the_next_step(pair: Pair) -> None:
    first = pair.append(part("a", 3), part("b", 1))
    assert first.hits is not None
    assert (first.hits.index == -1).all()
    assert first.hits.scores is not None
    assert torch.isneginf(first.hits.scores).all()
    second = pair.append(part("b", 2), part("a", 3))
    assert second.hits is not None
    assert (second.hits.index[:, :, :, 2] >= 0).any()
    assert second.sequences[1].first_position == 3


@pytest.mark.parametrize("lengths", [(10,), (11,), (25,), (4, 4, 4, 4), (1,) * 23, (9, 2, 10, 1)])
def test_a_full_ring_keeps_the_newest_rows(pair: Pair, lengths: Sequence[int]) -> None:
    for length in lengths:
        pair.append(part("a", length))
        pair.look("a", "nobody")


def test_every_window_at_every_seam() -> None:
    for before, after in itertools.product((0, 1, 2, 12), repeat=2):
        pair = Pair(torch.device("cpu"), replace(SPEC, num_layers=1, capacity=5, payloads=()))
        options = RetrieveOptions(top_k=7, window_before=before, window_after=after)
        for _ in range(13):
            pair.step(pair.batch(part("a", 1), retrieve=options))


def test_a_prefix_read_after_the_ring_wrapped_sees_what_is_left_of_the_prefix(pair: Pair) -> None:
    pair.append(part("a", 10))
    pair.append(part("a", 6))
    for as_of in range(17):
        result = pair.look("a", as_of=as_of)
        assert result.sequences[0].live_begin == min(6, as_of)
    with pytest.raises(PositionExpired):
        pair.look("a", as_of=17)


def test_ragged_batches_with_empty_parts(pair: Pair) -> None:
    pair.append(part("a", 0), part("b", 7), part("c", 0), part("d", 2))
    pair.append(part("d", 0), part("c", 12), part("b", 1))
    pair.append(part("a", 0))
    pair.look("a", "b", "c", "d", "e")


def test_one_layer_of_several_can_be_asked(pair: Pair) -> None:
    pair.append(part("a", 5))
    pair.step(pair.batch(part("a", 4), append=False, layers=(1,)))


def test_no_arrays_and_no_scores(pair: Pair) -> None:
    pair.append(part("a", 5))
    result = pair.step(
        pair.batch(part("a", 2), append=False, retrieve=RetrieveOptions(top_k=3, arrays=(), omit_scores=True))
    )
    assert result.hits is not None
    assert result.hits.scores is None
    assert not result.hits.arrays


def test_start_of_sequence_empties_before_the_retrieval(pair: Pair) -> None:
    before = pair.append(part("a", 5), part("b", 5))
    result = pair.append(part("a", 2, start=True), part("b", 2))
    assert result.sequences[0].as_of == 0
    assert result.sequences[0].epoch != before.sequences[0].epoch
    assert result.sequences[1].as_of == 5
    pair.step(pair.batch(part("b", 1, start=True), part("new", 1, start=True), append=False))
    pair.look("a", "b")


def test_a_fork_shares_the_prefix_and_then_diverges(pair: Pair) -> None:
    pair.append(part("a", 16))
    for target, as_of in (("b", None), ("c", 12), ("d", 2)):
        got = pair.memory.fork("a", target, as_of, 0)
        assert got == pair.reference.fork("a", target, as_of, 0)
    pair.look("a", "b", "c", "d")
    pair.append(part("a", 3), part("b", 1), part("c", 7), part("d", 11))
    pair.look("a", "b", "c", "d")
    pair.compare_counts()


def test_a_fork_that_cannot_be(pair: Pair) -> None:
    pair.append(part("a", 3), part("b", 1))
    for arguments, error in (
        (("nobody", "c", None, 0), NotFound),
        (("a", "b", None, 0), AlreadyExists),
        (("a", "c", 4, 0), PositionExpired),
        (("a", "c", None, 77), EpochChanged),
    ):
        for memory in (pair.memory, pair.reference):
            with pytest.raises(error):
                memory.fork(*arguments)
    pair.append(part("c", 1), part("d", 1))
    for memory in (pair.memory, pair.reference):
        with pytest.raises(QuotaExceeded):
            memory.fork("a", "e", None, 0)
    pair.compare_counts()


def test_reset_and_release(pair: Pair) -> None:
    pair.append(part("a", 12), part("b", 3), part("c", 1), part("d", 1))
    assert pair.memory.reset(["a", "x"], False) == pair.reference.reset(["a", "x"], False)
    assert pair.memory.reset(["b"], True) == pair.reference.reset(["b"], True) == [0]
    pair.look("a", "b", "c")
    pair.append(part("a", 4), part("e", 2))
    pair.look("a", "b", "e")


def test_more_sequences_than_there_is_room_for_leave_the_batch_undone(pair: Pair) -> None:
    pair.append(part("a", 1), part("b", 1), part("c", 1))
    with pytest.raises(QuotaExceeded):
        pair.append(part("a", 2, start=True), part("d", 1), part("e", 1))
    assert pair.look("a").sequences[0].as_of == 1
    pair.append(part("d", 1))


def test_joined_batches_get_what_they_would_get_alone(device: torch.device) -> None:
    together, alone = Pair(device), Pair(device)
    for _ in range(4):
        batches = [
            alone.batch(part("a", 3), part("b", 0), writer="v"),
            alone.batch(part("c", 5, seq=7), writer="w"),
            alone.batch(part("x", 2), append=False),
            alone.batch(part("d", 1), retrieve=None),
        ]
        batches[0] = dataclasses.replace(batches[0], writer="", keys=batches[0].keys.half())
        results = together.memory.step(batches)
        for batch, result in zip(batches, results, strict=True):
            if isinstance(result, MemstoreError):
                with pytest.raises(type(result)):
                    alone.reference.step(batch)
            else:
                assert_same(alone.reference, batch, result, alone.reference.step(batch))
    assert isinstance(results[1], SequenceGap)


def test_joined_batches_share_the_room_that_is_left(device: torch.device) -> None:
    pair = Pair(device)
    pair.append(part("a", 1), part("b", 1), part("c", 1))
    fits, does_not = pair.memory.step([pair.batch(part("d", 1)), pair.batch(part("e", 1))])
    assert isinstance(fits, StepResult)
    assert isinstance(does_not, QuotaExceeded)


def test_a_call_that_would_keep_the_device_for_too_long_is_refused_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By what its queries see, and not by what there might be; of more queries at once than that, some at a time."""
    monkeypatch.setattr("memstore.planner.MOST_PRODUCTS", {"cpu": 4 * 6 * 2 * 128})
    spec = MemorySpec(name="m", dim=3, capacity=8, max_sequences=2, num_layers=2)
    memory = Memory(spec, torch.device("cpu"), new_epoch=iter(range(1, 99)).__next__)

    def step(sequence: str, rows: int, seq: int | None = None) -> StepResult | MemstoreError:
        (result,) = memory.step(
            [
                StepBatch(
                    parts=(SequencePart(sequence=sequence, num_rows=rows, seq=seq or 0),),
                    layers=(0, 1),
                    keys=torch.ones(2, rows, 3),
                    retrieve=RetrieveOptions(top_k=1),
                    append=seq is not None,
                    writer="w" if seq is not None else "",
                )
            ]
        )
        return result

    assert isinstance(step("a", 6, 0), StepResult), "there is nothing to see yet"
    assert isinstance(step("a", 4), StepResult)
    refused = step("a", 5, 1)
    assert isinstance(refused, InvalidRequest)
    assert str(refused) == "sequences: 30 scores a layer, at most 24 in a call; ask for fewer"
    assert memory.counts().num_rows == 12
    assert isinstance(step("b", 8), StepResult)


@pytest.mark.parametrize(("nprobe", "num_read"), [(1, 96), (2, 128)])
def test_of_lists_those_that_are_probed_count_towards_what_a_call_may_take(
    monkeypatch: pytest.MonkeyPatch, nprobe: int, num_read: int
) -> None:
    pytest.importorskip("faiss")
    settings = IndexSettings(generation_rows=16, nlist=2, nprobe=nprobe)
    spec = MemorySpec(
        name="m", dim=3, capacity=128, max_sequences=1, index=IndexKind.FAISS_IVF_FLAT, index_settings=settings
    )

    def searched(most: int) -> StepResult | MemstoreError:
        monkeypatch.setattr("memstore.planner.MOST_PRODUCTS", {"cpu": most * 128})
        memory = Memory(spec, CPU, new_epoch=lambda: 1)
        keys = torch.ones(1, 128, 3)
        memory.step([StepBatch(parts=(SequencePart(sequence="a", num_rows=128),), layers=(0,), keys=keys, append=True)])
        parts = (SequencePart(sequence="a", num_rows=1),)
        (result,) = memory.step(
            [StepBatch(parts=parts, layers=(0,), keys=keys[:, :1], retrieve=RetrieveOptions(top_k=1))]
        )
        memory.free()
        return result

    assert isinstance(searched(num_read), StepResult)
    assert isinstance(searched(num_read - 1), InvalidRequest)


def test_too_large_a_memory_is_refused_at_once(device: torch.device) -> None:
    spec = replace(SPEC, dim=8192, capacity=1 << 24, max_sequences=1 << 12)
    with pytest.raises(DeviceMemoryFull):
        Memory(spec, device, new_epoch=lambda: 1)


def test_the_reserved_bytes_are_those_of_every_array() -> None:
    entry = DIM * 2 + 4 + 6 * 2 + 8
    assert Memory.bytes_needed(SPEC, CPU) == entry * SPEC.capacity * SPEC.max_sequences * SPEC.num_layers
    assert Memory.bytes_needed(replace(SPEC, metric=Metric.INNER_PRODUCT, payloads=()), CPU) == DIM * 2 * 10 * 4 * 2
