"""Sequences that leave the device under pressure and come back: who, when, and that nobody sees a difference."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from memstore import lifecycle
from memstore.errors import InvalidRequest, NotFound, PositionExpired, QuotaExceeded
from memstore.memory import Memory
from memstore.tiers import host_bytes, replies_room
from memstore.types import FirstPass, Hits, MemorySpec, Metric, RetrieveOptions, SpillSpec, StepBatch, StepResult
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import decode_spec, encode_spec
from tests.lives import batch, found
from tests.spilling import CPU, RICH, SPEC, Watched, looked, plain

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 9], ids=str)
@pytest.mark.parametrize(
    "spec",
    [SPEC, RICH, replace(SPEC, first_pass=FirstPass.INT8), replace(SPEC, metric=Metric.INNER_PRODUCT)],
    ids=["plain", "rich", "codes", "ip"],
)
@pytest.mark.parametrize("host", [0, 1, 3], ids=str)
def test_what_comes_back_answers_as_if_it_had_never_left(host: int, spec: MemorySpec, rows: int, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    spec = replace(spec, spill=replace(spec.spill, host_sequences=host))
    spilling = Watched(spec, torch.device(device))
    ample = Watched(plain(spec), torch.device(device))
    for each in (spilling, ample):
        for name in "abcde":
            each.append(name, rows)
    assert spilling.tiers == (2, host, 3 - host)
    for name in "aebdacab":
        assert looked(spilling.memory, name) == looked(ample.memory, name)
        step = batch(spec, name, rows, 1, value=7)
        epoch = spilling.memory._table.epoch(name)
        assert epoch == ample.memory._table.epoch(name)
        assert spilling.step(step) == ample.step(step), "the second time a resend"
    left, right = spilling.memory.counts(), ample.memory.counts()
    assert (left.num_sequences, left.num_rows) == (right.num_sequences, right.num_rows)
    assert (left.appended_rows, left.evicted_rows) == (right.appended_rows, right.evicted_rows)


def test_the_least_recently_used_leaves_first() -> None:
    watched = Watched()
    watched.append("ab")
    found(watched.memory, "a")
    watched.append("c")
    assert watched.resident() == "ac", "b was used before a"
    watched.append("d")
    assert watched.resident() == "cd"
    watched.memory.fork("c", "e", None, 0)
    assert watched.resident() == "ce"
    assert watched.tiers == (2, 1, 2)
    assert (watched.counts.spills, watched.counts.returns) == (3, 0)


def test_as_many_as_the_memory_has_room_for_and_no_more() -> None:
    watched = Watched()
    watched.append("abcde")
    with pytest.raises(QuotaExceeded, match="5 of the 5"):
        watched.append("f")
    assert watched.memory.counts().num_sequences == 5
    watched.append("abcde", 2, 1)
    watched.memory.reset(["c"], release=True)
    watched.append("f")
    assert watched.memory.counts().num_sequences == 5


def test_exactly_once_survives_a_stay_away() -> None:
    watched = Watched()
    watched.append("a", 1, 0)
    watched.append("a", 2, 1)
    first = watched.memory._table.epoch("a")
    watched.append("bcd")
    assert watched.tiers == (2, 1, 1)
    (again,) = watched.step(batch(SPEC, "a", 2, 1, value=ord("a")))
    assert isinstance(again, StepResult)
    assert (again.sequences[0].is_replay, again.sequences[0].first_position) == (True, 1)
    assert again.sequences[0].epoch == first
    watched.append("bcd", 1, 1)
    watched.append("a", 1, 2)
    assert found(watched.memory, "a").sequences[0].as_of == 4


def test_an_append_of_nothing_is_remembered_by_a_sequence_that_is_unpinned_while_it_is_away() -> None:
    watched = Watched(replace(SPEC, spill=SpillSpec(max_sequences=1)))
    watched.append("a", 0)
    watched.append("bc")
    assert watched.tiers == (2, 0, 1)
    watched.memory.pin(["a"], False)
    (again,) = watched.step(batch(SPEC, "a", 0, 0, value=ord("a")))
    assert isinstance(again, StepResult)
    assert again.sequences[0].is_replay


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_the_sequences_of_a_call_stay_for_each_other(names: str) -> None:
    watched = Watched()
    watched.append("abc", 1)
    assert watched.resident() == "bc", "b is the one that was used least recently"
    (result,) = watched.step(_together(names))
    assert isinstance(result, StepResult)
    assert watched.resident() == "ab"
    assert [found(watched.memory, name).sequences[0].as_of for name in names] == [2, 2]
    assert watched.counts.returns == 1, "only what was away has come back"


def test_a_call_has_no_more_places_than_there_are() -> None:
    watched = Watched()
    watched.append("abc")
    three = _together("abc")
    (refused,) = watched.step(three)
    assert isinstance(refused, QuotaExceeded)
    assert "2 at once" in str(refused)
    assert watched.memory.counts().appended_rows == 9
    (done,) = watched.step(_together("ac"))
    assert isinstance(done, StepResult)
    assert watched.resident() == "ac"


def test_joined_calls_are_done_by_as_many_as_have_places() -> None:
    watched, ample = Watched(), Watched(plain(SPEC))
    for each in (watched, ample):
        each.append("abcd")
    steps = [batch(SPEC, name, 1, 1, value=9) for name in "badc"]
    steps.insert(2, batch(SPEC, "a", 1, 7))  # a gap
    steps[2] = replace(steps[2], parts=(steps[2].parts[0]._replace(sequence="x", epoch=5),))
    carried: list[int] = []
    ask = RetrieveOptions(top_k=2)
    asking = [replace(step, retrieve=ask) for step in steps]
    got = watched.memory.step(asking, lambda at, _: carried.append(at))
    want = ample.memory.step(asking)
    assert [type(each) for each in got] == [type(each) for each in want]
    for one, other in zip(got, want, strict=True):
        if isinstance(one, StepResult) and isinstance(other, StepResult):
            assert one.sequences == other.sequences
            assert one.hits is not None
            assert other.hits is not None
            assert one.hits.positions.tolist() == other.hits.positions.tolist()
    assert carried == [0, 1, 3, 4]


def test_joined_calls_may_bring_more_new_sequences_than_there_are_places() -> None:
    watched = Watched()
    results = watched.step(*(batch(SPEC, name, 2, 0, value=ord(name)) for name in "abcdef"))
    assert [type(each) for each in results] == [StepResult] * 5 + [QuotaExceeded]
    assert watched.tiers == (2, 1, 2)
    for name in "abcde":
        assert found(watched.memory, name).sequences[0].as_of == 2


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_joined_is_answered_as_with_places_for_all(seed: int) -> None:
    random = Random(seed)
    places, host = random.randint(2, 3), random.randint(0, 2)
    spec = replace(SPEC, max_sequences=places, spill=SpillSpec(max_sequences=7 - places, host_sequences=host))
    watched, ample = Watched(spec), Watched(plain(spec))
    seqs: Counter[str] = Counter()
    for number in range(30):
        names = random.sample("abcdefg", random.randint(1, 7))
        steps = []
        while names:
            together = [names.pop() for _ in range(min(len(names), random.randint(1, places)))]
            one = _together(together, random.randint(0, 3), [seqs[name] for name in together], number)
            is_append = random.random() < 0.7
            if is_append:
                seqs.update(together)
            steps.append(replace(one, append=is_append, retrieve=RetrieveOptions(top_k=3, window_before=1)))
        for one, other in zip(watched.step(*steps), ample.step(*steps), strict=True):
            assert isinstance(one, StepResult)
            assert isinstance(other, StepResult)
            assert one.sequences == other.sequences
            assert _shown(one.hits) == _shown(other.hits)
        if random.random() < 0.2:
            name = random.choice("abcdefg")
            release = random.random() < 0.5
            assert watched.memory.reset([name], release) == ample.memory.reset([name], release)
            seqs[name] = 0
    assert watched.counts.returns > 10


def test_a_call_that_is_refused_for_want_of_scratch_refuses_no_other() -> None:
    watched = Watched()
    watched.append("abcd")

    def carry(at: int, _: Hits) -> None:
        if at == 1:
            raise PositionExpired("no room in the reply")

    steps = [replace(batch(SPEC, name, 1, 1), retrieve=RetrieveOptions(top_k=1)) for name in "abc"]
    results = watched.memory.step(steps, carry)
    assert [type(each) for each in results] == [StepResult, PositionExpired, StepResult]


def test_a_pinned_sequence_stays() -> None:
    watched = Watched()
    watched.append("ab")
    assert watched.memory.pin(["a"], True) == 1
    watched.append("cde")
    assert watched.resident() == "ae"
    assert watched.memory.counts().num_pinned == 1
    with pytest.raises(QuotaExceeded, match="1 of them are pinned"):
        watched.memory.pin(["b", "c"], True)
    assert watched.memory.counts().num_pinned == 1
    assert watched.memory.pin(["b"], True) == 2, "it came back for that"
    assert watched.resident() == "ab"
    (refused,) = watched.step(batch(SPEC, "c", 1, 1))
    assert isinstance(refused, QuotaExceeded)
    watched.append("ab", 1, 1)
    assert watched.memory.pin(["a"], False) == 1
    watched.append("c", 1, 1)
    assert watched.resident() == "bc"
    with pytest.raises(NotFound):
        watched.memory.pin(["b", "nobody"], False)
    assert watched.memory.counts().num_pinned == 1
    watched.memory.reset(["b"], release=True)
    assert watched.memory.counts().num_pinned == 0


@pytest.mark.parametrize("release", [True, False])
def test_what_is_away_can_be_reset_where_it_is(release: bool) -> None:
    watched = Watched()
    watched.append("abcd")
    before = watched.tiers
    epochs = watched.memory.reset(["a", "b"], release)
    assert watched.counts.returns == 0
    assert watched.tiers == ((2, 0, 0) if release else before)
    assert [epoch == 0 for epoch in epochs] == [release, release]
    assert not watched.disk.files, "there is nothing to keep"
    watched.append("ab", 2)
    for name in "ab":
        assert found(watched.memory, name).sequences[0].as_of == 2
    assert watched.memory.counts().num_rows == 10


def test_idle_sequences_end_and_pins_and_use_are_honoured() -> None:
    watched = Watched(replace(SPEC, idle_ttl_s=60))
    watched.append("abcd")
    watched.memory.pin(["c"], True)
    watched.clock.advance(50)
    found(watched.memory, "a")
    assert watched.memory.expire() == 0
    watched.clock.advance(11)
    assert watched.memory.expire() == 2
    assert sorted(name for name, _ in watched.memory._table.items()) == ["a", "c"]
    assert (watched.memory.counts().expired_sequences, watched.memory.counts().num_pinned) == (2, 1)
    watched.clock.advance(60)
    assert watched.memory.expire() == 1
    watched.memory.pin(["c"], False)
    assert watched.memory.expire() == 0, "that was a use"
    watched.clock.advance(60)
    assert watched.memory.expire() == 1
    assert watched.memory.counts().num_rows == 0
    watched.append("abcde")


def test_many_that_are_idle_end_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "MAX_EXPIRED", 2)
    watched = Watched(replace(SPEC, idle_ttl_s=60))
    watched.append("abcde")
    watched.clock.advance(60)
    assert [watched.memory.expire() for _ in range(4)] == [2, 2, 1, 0]
    assert not watched.disk.files


def test_idle_sequences_end_where_nothing_is_spilled_too() -> None:
    watched = Watched(replace(plain(SPEC), idle_ttl_s=60))
    watched.append("ab")
    watched.clock.advance(30)
    watched.memory.fork("b", "c", None, 0)
    watched.clock.advance(31)
    assert watched.memory.expire() == 1
    assert sorted(name for name, _ in watched.memory._table.items()) == ["b", "c"]
    with pytest.raises(NotFound):
        watched.memory.fork("a", "d", None, 0)


def test_host_memory_is_counted() -> None:
    spec = replace(SPEC, max_sequences=4)
    assert host_bytes(plain(spec)) == 0
    row_bytes = 2 * 2 + 4
    rows = 2 * 4 * row_bytes  # one more place than stays there
    assert host_bytes(spec) == rows + replies_room(spec)
    assert host_bytes(replace(spec, spill=SpillSpec(max_sequences=3))) == rows // 2, "what passes through stays no time"
    assert Memory.bytes_needed(spec, CPU) == Memory.bytes_needed(replace(spec, spill=SpillSpec()), CPU) + host_bytes(
        spec
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"spill": pb.SpillSpec(max_sequences=-1)}, "spec.spill.max_sequences"),
        ({"spill": pb.SpillSpec(max_sequences=1_048_577)}, "spec.spill.max_sequences"),
        ({"spill": pb.SpillSpec(max_sequences=2, host_sequences=3)}, "spec.spill.host_sequences"),
        ({"spill": pb.SpillSpec(max_sequences=2, policy=9)}, "spec.spill.policy"),  # type: ignore[arg-type]
        ({"spill": pb.SpillSpec(max_sequences=2), "index": pb.INDEX_KIND_FAISS_IVF_FLAT}, "spec.spill"),
        ({"idle_ttl_s": -1}, "spec.idle_ttl_s"),
        ({"idle_ttl_s": 31_536_001}, "spec.idle_ttl_s"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_at_create(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        decode_spec(pb.MemorySpec(name="m", dim=1, capacity=64, **changes))
    assert raised.value.metadata["field"] == field


def test_a_spec_survives_the_wire() -> None:
    spec = replace(SPEC, idle_ttl_s=7)
    assert decode_spec(encode_spec(spec)) == spec
    assert not encode_spec(plain(SPEC)).HasField("spill")


def _shown(hits: Hits | None) -> list[object]:
    assert hits is not None
    assert hits.scores is not None
    return [hits.positions.tolist(), hits.index.tolist(), hits.scores.tolist(), hits.arrays["key"].tolist()]


def _together(
    names: SequenceOf[str], rows: int = 1, seqs: SequenceOf[int] | None = None, value: float = 0.0
) -> StepBatch:
    """One call that appends to several sequences."""
    numbers = seqs or [1] * len(names)
    each = [batch(SPEC, name, rows, seq, value=value) for name, seq in zip(names, numbers, strict=True)]
    return replace(
        each[0],
        parts=tuple(step.parts[0] for step in each),
        keys=torch.cat([step.keys for step in each], 1),
        fingerprints=tuple(step.fingerprints[0] for step in each),
    )


@pytest.mark.parametrize("num_spilled", [0, 3])
def test_a_memory_that_is_full_says_how_many_sequences_it_has_wherever_they_lie(num_spilled: int) -> None:
    spilling = SpillSpec(max_sequences=num_spilled, host_sequences=num_spilled)
    spec = MemorySpec(name="m", dim=2, capacity=4, max_sequences=2, spill=spilling)
    memory = Memory(spec, CPU, new_epoch=iter(range(1, 99)).__next__)
    for number in range(2 + num_spilled):
        (result,) = memory.step([batch(spec, str(number), 1, 0)])
        assert isinstance(result, StepResult)
    (refused,) = memory.step([batch(spec, "more", 1, 0)])
    assert isinstance(refused, QuotaExceeded)
    number = 2 + num_spilled
    assert str(refused) == f"sequences: 1 new ones, but there are {number} of the {number} that the memory can have"
