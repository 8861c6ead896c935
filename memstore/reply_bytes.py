"""What writers were answered, as bytes and back: in snapshots, and in the files of sequences that were spilled.

And what it takes in memory, where it is no bytes but values.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from memstore.sequence import REPLAY_WINDOW, Reply, Writer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from memstore.sequence import Sequence as Stream

NUMBERS = 6
"""uint64 of a reply: rows, fingerprint, as_of, first position, whether it began an epoch, and sent with which."""

REPLY_BYTES, WRITER_BYTES = 336, 1024
"""What a reply takes in memory, and a writer beside its replies; as measured, with numbers of the largest kind."""
A_WRITER_BYTES = WRITER_BYTES + REPLAY_WINDOW * REPLY_BYTES
"""A writer with all replies that are kept of it."""


def held_bytes(sequence: Stream) -> int:
    """Bytes of memory that the writers of a sequence take."""
    return sum(WRITER_BYTES + REPLY_BYTES * len(writer.replies) for writer in sequence.writers.values())


def writers_entry(sequence: Stream) -> list[list[object]]:
    """The writers of a sequence by name: next seq, and number of the replies that are kept."""
    return [[name, writer.next_seq, len(writer.replies)] for name, writer in sequence.writers.items()]


def encode_replies(sequence: Stream) -> bytes:
    """The replies to them, in the same order: uint64 (replies, NUMBERS)."""
    numbers = [
        (
            reply.num_rows,
            reply.fingerprint,
            reply.as_of,
            reply.first_position,
            reply.begun_from is not None,
            reply.begun_from or 0,
        )
        for writer in sequence.writers.values()
        for reply in writer.replies.values()
    ]
    return np.array(numbers, np.uint64).tobytes()


def found_writers(entry: Sequence[Any], replies: Iterator[list[int]]) -> OrderedDict[str, Writer]:
    """The writers of such an entry, with the next of the replies. StopIteration, TypeError, ValueError: do not fit."""
    writers: OrderedDict[str, Writer] = OrderedDict()
    for name, *counts in entry:
        next_seq, num_replies = map(a_count, counts)
        writers[a_name(name)] = writer = Writer(next_seq=next_seq)
        for seq in range(next_seq - num_replies, next_seq):
            num_rows, fingerprint, as_of, first_position, is_beginning, begun_from = next(replies)
            writer.replies[seq] = Reply(
                num_rows=num_rows,
                fingerprint=fingerprint,
                as_of=as_of,
                first_position=first_position,
                begun_from=begun_from if is_beginning else None,
            )
    return writers


def a_count(value: object) -> int:
    """A whole number from 0 on that 63 bits can hold. ValueError for anything else that JSON has."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is no count")
    return value


def a_name(value: object) -> str:
    """A name. ValueError for anything else that JSON has."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no name")
    return value
