"""Sequences that leave the device under pressure and come back: who, when, and that nobody sees a difference."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from memstore import lifecycle
from memstore.errors import Corrupt, InvalidRequest, MemstoreError, NotFound, PositionExpired, QuotaExceeded
from memstore.memory import Memory
from memstore.reply_bytes import held_bytes
from memstore.sequence import Reply, Sequence
from memstore.spill_file import SpillFolder
from memstore.tiers import host_bytes, replies_room
from memstore.types import (
    FirstPass,
    Hits,
    MemorySpec,
    Metric,
    PayloadSpec,
    RetrieveOptions,
    SpillCounts,
    SpillSpec,
    StepBatch,
    StepResult,
)
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import decode_spec, encode_spec
from tests.fakes import FakeAppendFile, FakeClock, FakeDisk
from tests.lives import batch, found

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

CPU = torch.device("cpu")
FOLDER = Path("/data/spilled/t/m")
SPEC = MemorySpec(name="m", dim=2, capacity=4, max_sequences=2, spill=SpillSpec(max_sequences=3, host_sequences=1))
RICH = replace(
    SPEC,
    num_layers=2,
    metric=Metric.COSINE,
    payloads=(PayloadSpec(name="hidden", dtype=torch.bfloat16, shape=(3,)),),
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Watched:
    """A memory that spills, its clock and its disk."""

    def __init__(self, spec: MemorySpec = SPEC, device: torch.device = CPU) -> None:
        self.clock = FakeClock()
        self.disk = FakeDisk()
        self.memory = Memory(spec, device, new_epoch=itertools.count(1).__next__)
        self.memory.lifecycle.clock = self.clock
        if self.memory.lifecycle.spill is not None:
            self.memory.lifecycle.spill.tiers.files.folder = SpillFolder(FOLDER, self.disk)

    @property
    def counts(self) -> SpillCounts:
        """Where sequences lie."""
        counts = self.memory.counts().spill
        assert counts is not None
        return counts

    @property
    def tiers(self) -> tuple[int, int, int]:
        """Sequences on the device, in host memory, in files."""
        counts = self.counts
        return counts.num_resident, counts.num_on_host, counts.num_on_disk

    def resident(self) -> str:
        """The names of sequences on the device."""
        return "".join(
            sorted(n for n, each in self.memory._table.items() if each.place < self.memory.spec.max_sequences)
        )

    def step(self, *batches: StepBatch) -> list[StepResult | MemstoreError]:
        """Several steps joined into one."""
        self.clock.advance(1)
        return self.memory.step(batches)

    def append(self, names: str, rows: int = 3, seq: int = 0, value: float = 0.0) -> None:
        """Appends to each of these sequences, one after another."""
        for name in names:
            (result,) = self.step(batch(self.memory.spec, name, rows, seq, value=value + ord(name)))
            if isinstance(result, MemstoreError):
                raise result


def plain(spec: MemorySpec) -> MemorySpec:
    """The same memory with a place for every sequence."""
    return replace(spec, max_sequences=spec.total_sequences, spill=SpillSpec())


def looked(memory: Memory, name: str) -> list[Any]:
    """All that a retrieval gives, to be compared."""
    result = found(memory, name)
    hits = result.hits
    assert isinstance(hits, Hits)
    assert hits.scores is not None
    arrays = {each: rows.cpu().view(torch.uint8).tolist() for each, rows in hits.arrays.items()}
    return [result.sequences, hits.positions.tolist(), hits.index.tolist(), hits.scores.cpu().tolist(), arrays]


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
    with pytest.raises(QuotaExceeded, match="2 of 2 places"):
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


def test_files_go_when_nobody_needs_them() -> None:
    watched = Watched()
    watched.append("abcde")
    assert len(watched.disk.files) == 2
    assert watched.counts.disk_bytes == sum(map(len, watched.disk.files.values()))
    found(watched.memory, "a")
    assert len(watched.disk.files) == 2, "another one went there"
    watched.memory.reset(list("abcde"), release=True)
    assert not watched.disk.files
    assert watched.counts.disk_bytes == 0
    watched.append("abcde")
    watched.memory.free()
    watched.memory.remove_files()
    assert not watched.disk.files


def test_a_file_that_could_not_be_removed_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, ample = Watched(), Watched(plain(SPEC))
    watched.disk.files[FOLDER / "sequence-00000001"] = b"left over"
    for each in (watched, ample):
        each.append("abc")
    with monkeypatch.context() as failing:
        failing.setattr(watched.disk, "remove", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        watched.disk.is_full = True
        failing.setattr(watched.disk, "scratch", lambda path: _created(watched.disk, path))
        (refused,) = watched.step(batch(SPEC, "d", 1, 0))
        assert isinstance(refused, QuotaExceeded)
    watched.disk.is_full = False
    assert FOLDER / "sequence-00000000" in watched.disk.files, "half of a file, which could not be removed"
    for each in (watched, ample):
        each.append("de")
    for name in "abcde":
        assert looked(watched.memory, name) == looked(ample.memory, name)
    assert watched.disk.files[FOLDER / "sequence-00000001"] == b"left over"
    watched.memory.free()
    watched.memory.remove_files()
    assert not watched.disk.files


def _created(disk: FakeDisk, path: Path) -> FakeAppendFile:
    """A file on a disk on which names have room, and content has none."""
    if path in disk.files:
        raise FileExistsError(17, "File exists", str(path))
    disk.files[path] = b""
    return FakeAppendFile(disk, path)


def test_a_full_disk_refuses_what_needs_it_and_loses_nothing() -> None:
    watched, ample = Watched(), Watched(plain(SPEC))
    for each in (watched, ample):
        each.append("abc")
    watched.disk.is_full = True
    for _ in range(3):
        (refused,) = watched.step(batch(SPEC, "d", 1, 0))
        assert isinstance(refused, QuotaExceeded)
        assert "disk" in str(refused)
    assert watched.tiers == (2, 1, 0)
    assert not watched.disk.files
    assert watched.resident() == "bc"
    for name in "abcab":  # what changes places in memory needs no disk
        assert looked(watched.memory, name) == looked(ample.memory, name)
    watched.disk.is_full = False
    watched.append("de")
    for name in "abc":
        assert looked(watched.memory, name) == looked(ample.memory, name)


def test_without_a_folder_host_memory_is_enough_for_what_may_lie_there() -> None:
    spec = replace(SPEC, spill=SpillSpec(max_sequences=3, host_sequences=3))
    watched = Watched(spec)
    assert watched.memory.lifecycle.spill is not None
    watched.memory.lifecycle.spill.tiers.files.folder = None
    watched.append("abcde")
    for seq in range(1, 4):
        watched.append("abcdeedcba"[5 * (seq % 2) :][:5], 1, seq)
    assert watched.tiers == (2, 3, 0)


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_a_file_is_found(bit: int) -> None:
    watched = Watched(replace(SPEC, spill=SpillSpec(max_sequences=1)))
    watched.append("abc")
    ((path, content),) = watched.disk.files.items()
    for at in range(len(content)):
        spoilt = bytearray(content)
        spoilt[at] ^= 1 << bit
        watched.disk.files[path] = bytes(spoilt)
        (result,) = watched.step(batch(SPEC, "a", 0, 1))
        assert isinstance(result, Corrupt), f"bit {bit} of byte {at}"
    assert watched.tiers == (2, 0, 1)


def test_every_truncation_of_a_file_is_found_and_a_reset_helps() -> None:
    watched = Watched(replace(SPEC, spill=SpillSpec(max_sequences=2)))
    watched.append("abc")
    ((path, content),) = watched.disk.files.items()
    for end in range(len(content)):
        watched.disk.files[path] = content[:end]
        (result,) = watched.step(batch(SPEC, "a", 0, 1))
        assert isinstance(result, Corrupt)
    watched.disk.files[path] = content + b"\0"
    assert isinstance(watched.step(batch(SPEC, "a", 0, 1))[0], Corrupt)
    del watched.disk.files[path]
    assert isinstance(watched.step(batch(SPEC, "a", 0, 1))[0], Corrupt)
    watched.append("bc", 1, 1)
    watched.memory.reset(["a"], release=False)
    watched.append("a", 2)
    assert found(watched.memory, "a").sequences[0].as_of == 2


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


def replies(watched: Watched, name: str, number: int, writers: str = "w") -> None:
    """Appends without rows, which are answered and remembered."""
    for writer in writers:
        known = watched.memory._table[name].writers.get(writer) if name in watched.memory._table else None
        first = 0 if known is None else known.next_seq
        for seq in range(first, first + number):
            watched.step(batch(watched.memory.spec, name, 0, seq, writer=writer))


def in_host_memory(watched: Watched) -> int:
    """Bytes of replies to the writers of sequences in host memory."""
    spill = watched.memory.lifecycle.spill
    assert spill is not None
    return sum(held_bytes(watched.memory._table[name]) for name in spill._hosted)


def test_replies_to_the_writers_of_sequences_in_host_memory_are_bounded() -> None:
    watched, ample = Watched(replace(SPEC, spill=SpillSpec(max_sequences=6, host_sequences=3))), Watched(plain(SPEC))
    room = replies_room(watched.memory.spec)
    assert host_bytes(watched.memory.spec) == room + 4 * 4 * (2 * 2 + 4)
    for each in (watched, ample):
        for name in "abcde":
            replies(each, name, 300 if name == "a" else 3, "vw" if name == "a" else "w")
    assert watched.tiers == (2, 3, 0), "they have room"
    for each in (watched, ample):
        replies(each, "c", 300, "tuvwx")
        replies(each, "d", 300, "tuvw")
        replies(each, "e", 1)
        replies(each, "d", 1)
    assert watched.counts.num_on_disk >= 1, "others have to go on"
    assert watched.counts.num_on_host >= 1
    for name in "abcdeabcde":
        assert in_host_memory(watched) <= room
        expected = ample.memory._table[name].writers
        looked(watched.memory, name)
        assert watched.memory._table[name].writers == expected
    watched.memory.reset(list("abcde"), release=True)
    spill = watched.memory.lifecycle.spill
    assert spill is not None
    assert spill._writer_bytes == 0


def test_without_files_replies_beyond_their_room_refuse_the_call_and_change_nothing() -> None:
    watched = Watched(replace(SPEC, max_sequences=1, spill=SpillSpec(max_sequences=1, host_sequences=1)))
    assert watched.memory.lifecycle.spill is not None
    watched.memory.lifecycle.spill.tiers.files.folder = None
    replies(watched, "a", 300, "uvw")
    (refused,) = watched.step(batch(SPEC, "b", 1, 0))
    assert isinstance(refused, QuotaExceeded)
    assert "writers" in str(refused)
    assert watched.tiers == (1, 0, 0)
    assert watched.step(batch(SPEC, "a", 1, 300, writer="u"))
    watched.memory.reset(["a"], release=False)
    watched.append("b", 1)
    assert watched.tiers == (1, 1, 0)


def test_what_is_counted_of_replies_is_at_least_what_they_take() -> None:
    tracemalloc.start()
    try:
        for writers, number in ((1, 1), (1, 256), (64, 256)):
            before = tracemalloc.get_traced_memory()[0]
            sequence = Sequence(0, 1)
            for each in range(writers):
                for seq in range(number):
                    at = 10**12 + 1000 * seq
                    reply = Reply(num_rows=at, fingerprint=at, as_of=at, first_position=at + 1, begun_from=2**62 + seq)
                    sequence.remember(f"{each:0128d}", reply)
            taken = tracemalloc.get_traced_memory()[0] - before
            assert 0.5 * held_bytes(sequence) <= taken <= held_bytes(sequence) + 2048
    finally:
        tracemalloc.stop()
