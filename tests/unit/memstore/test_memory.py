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
    MemstoreError,
    NotFound,
    PositionExpired,
    QuotaExceeded,
    SequenceGap,
)
from memstore.index import BUILDERS, INDEXES
from memstore.memory import Memory
from memstore.types import (
    KEY,
    IndexKind,
    MemorySpec,
    Metric,
    PayloadSpec,
    RetrieveOptions,
    SequencePart,
    StepBatch,
    StepResult,
)
from tests.comparing import assert_same
from tests.reference import ReferenceMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

CPU = torch.device("cpu")
DIM = 8
SPEC = MemorySpec(
    name="m",
    dim=DIM,
    capacity=10,
    max_sequences=4,
    num_layers=2,
    payloads=(
        PayloadSpec(name="hidden", dtype=torch.bfloat16, shape=(3, 2)),
        PayloadSpec(name="token", dtype=torch.int64, shape=(1,)),
    ),
)
EVERYTHING = RetrieveOptions(top_k=4, window_before=2, window_after=1, arrays=(KEY, "hidden", "token"))


class Pair:
    """A memory and its oracle; every step is made on both and compared."""

    def __init__(self, device: torch.device, spec: MemorySpec = SPEC) -> None:
        self.spec = spec
        self.memory = Memory(spec, device, new_epoch=itertools.count(1).__next__)
        self.reference = ReferenceMemory(spec)

    def batch(
        self,
        *parts: SequencePart,
        append: bool = True,
        retrieve: RetrieveOptions | None = EVERYTHING,
        writer: str = "",
        fingerprints: tuple[int, ...] = (),
        layers: tuple[int, ...] | None = None,
    ) -> StepBatch:
        """A batch of random rows."""
        layers = tuple(range(self.spec.num_layers)) if layers is None else layers
        rows = sum(part.num_rows for part in parts)
        payloads = {
            payload.name: (torch.randn(len(layers), rows, *payload.shape) * 100).to(payload.dtype)
            for payload in self.spec.payloads
        }
        return StepBatch(
            parts=parts,
            layers=layers,
            keys=torch.randn(len(layers), rows, self.spec.dim),
            payloads=payloads if append else {},
            retrieve=retrieve,
            append=append,
            writer=writer,
            fingerprints=fingerprints,
        )

    def step(self, batch: StepBatch) -> StepResult:
        """Both make the step; raises what both raise."""
        (got,) = self.memory.step([batch])
        if isinstance(got, MemstoreError):
            with pytest.raises(type(got)):
                self.reference.step(batch)
            self.compare_counts()
            raise got
        try:
            want = self.reference.step(batch)
        except MemstoreError as error:  # which a test that expects it must not take for the memory's
            raise AssertionError("the memory has done what the oracle refuses") from error
        assert_same(self.reference, batch, got, want)
        self.compare_counts()
        return got

    def append(self, *parts: SequencePart, writer: str = "", fingerprints: tuple[int, ...] = ()) -> StepResult:
        """A step of new random rows."""
        return self.step(self.batch(*parts, writer=writer, fingerprints=fingerprints))

    def look(self, *sequences: str, as_of: int | None = None) -> StepResult:
        """Retrieves only, three queries for each."""
        parts = [SequencePart(sequence=name, num_rows=3, as_of=as_of) for name in sequences]
        return self.step(self.batch(*parts, append=False))

    def compare_counts(self) -> None:
        """The counters agree."""
        got, want = self.memory.counts(), self.reference.counts()
        assert (got.num_sequences, got.num_rows) == (want.num_sequences, want.num_rows)
        assert (got.appended_rows, got.evicted_rows) == (want.appended_rows, want.evicted_rows)


def part(sequence: str, num_rows: int, *, seq: int = 0, epoch: int = 0, start: bool = False) -> SequencePart:
    return SequencePart(sequence=sequence, num_rows=num_rows, seq=seq, epoch=epoch, start_of_sequence=start)


@pytest.fixture(params=list(IndexKind), ids=lambda kind: kind.value)
def pair(request: pytest.FixtureRequest, device: torch.device) -> Pair:
    if request.param is not IndexKind.EXACT:
        pytest.importorskip("faiss")
    if request.param not in INDEXES and device.type not in BUILDERS:
        pytest.skip(f"no builder for {device}")
    return Pair(device, replace(SPEC, index=request.param))


def replace(spec: MemorySpec, **changes: object) -> MemorySpec:
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


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


def test_too_large_a_memory_is_refused_at_once(device: torch.device) -> None:
    spec = replace(SPEC, dim=8192, capacity=1 << 24, max_sequences=1 << 12)
    with pytest.raises(DeviceMemoryFull):
        Memory(spec, device, new_epoch=lambda: 1)


def test_the_reserved_bytes_are_those_of_every_array() -> None:
    entry = DIM * 2 + 4 + 6 * 2 + 8
    assert Memory.bytes_needed(SPEC, CPU) == entry * SPEC.capacity * SPEC.max_sequences * SPEC.num_layers
    assert Memory.bytes_needed(replace(SPEC, metric=Metric.INNER_PRODUCT, payloads=()), CPU) == DIM * 2 * 10 * 4 * 2
