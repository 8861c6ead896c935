"""Replies to the writers of sequences in host memory: counted, bounded, and never lost."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

from memstore.errors import QuotaExceeded
from memstore.reply_bytes import held_bytes
from memstore.sequence import Reply, Sequence
from memstore.tiers import host_bytes, replies_room
from memstore.types import SpillSpec
from tests.lives import batch
from tests.spilling import SPEC, Watched, looked, plain


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


def test_what_is_kept_of_the_writers_of_one_sequence_is_bounded() -> None:
    sequence, most = Sequence(0, 1), 64 * 85 * 1024
    for each in range(70):
        for seq in range(260):
            sequence.remember(f"{each}", Reply(num_rows=1, fingerprint=seq, as_of=seq, first_position=seq))
    assert held_bytes(sequence) == most
    for seq in range(600):
        sequence.remember(f"{seq}", Reply(num_rows=1, fingerprint=seq, as_of=seq, first_position=seq))
    assert held_bytes(sequence) < most


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
