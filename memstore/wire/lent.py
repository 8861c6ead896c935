"""What stands in a control block and beside it: the state of a lent sequence, both ways, and who wants a lease."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from memstore.control import LAYOUT, MAX_POSITION, ControlBlock, block_bytes
from memstore.errors import Corrupt, InvalidRequest
from memstore.lender import LentState
from memstore.sequence import MAX_WRITERS, REPLAY_WINDOW, Reply, Writer
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import fields, limits
from memstore.wire.batch import sequence_name
from memstore.wire.spec import decode_spec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memstore.types import MemorySpec

_MAX_WORD = (1 << 63) - 1


def writer_name(value: str, field: str) -> str:
    """1 to 64 printable ASCII characters."""
    return fields.printable(value, field, 1, limits.MAX_WRITER_NAME)


def leave_states(block: ControlBlock, states: Iterable[LentState]) -> None:
    """Writes states into the cells of a block; those who appended longest ago are left out where they do not fit."""
    for index, state in enumerate(states):
        message = _encode(state)
        while not block.put_state(index, message.SerializeToString()):
            del message.writers[0]


def found_states(block: ControlBlock) -> list[LentState]:
    """The states in the cells of a block, checked as any outside input. Raises Corrupt."""
    return [_decode(block.state(index)) for index in range(block.num_sequences)]


def decode_mapped(mapped: pb.MappedMemory) -> MemorySpec:
    """The spec of a mapped memory, whose other fields are checked too. Raises InvalidRequest."""
    if mapped.layout != LAYOUT:
        raise InvalidRequest("layout", f"{mapped.layout}, {LAYOUT} is understood here")
    fields.whole(mapped.num_sequences, "num_sequences", 1, limits.MAX_PARTS)
    expected = block_bytes(mapped.num_sequences)
    fields.whole(mapped.block_bytes, "block_bytes", expected, expected)
    return decode_spec(mapped.spec)


def _encode(state: LentState) -> pb.LentSequence:
    message = pb.LentSequence(
        sequence=state.name,
        place=state.place,
        epoch=state.epoch,
        next_position=state.next_position,
        floor=state.floor,
    )
    for name, writer in state.writers.items():
        replies = [
            pb.LentReply(
                num_rows=reply.num_rows,
                fingerprint=reply.fingerprint,
                as_of=reply.as_of,
                first_position=reply.first_position,
                begun_from=reply.begun_from,
            )
            for reply in writer.replies.values()
        ]
        message.writers.add(writer=name, next_seq=writer.next_seq, replies=replies)
    return message


def _decode(content: bytes) -> LentState:
    try:
        message = pb.LentSequence.FromString(content)
        next_position = fields.whole(message.next_position, "next_position", 0, MAX_POSITION)
        if len(message.writers) > MAX_WRITERS:
            raise InvalidRequest("writers", f"{len(message.writers)}, at most {MAX_WRITERS}")
        return LentState(
            name=sequence_name(message.sequence, "sequence"),
            place=fields.whole(message.place, "place", 0, limits.MAX_SEQUENCES - 1),
            epoch=fields.whole(message.epoch, "epoch", 0, _MAX_WORD),
            next_position=next_position,
            floor=fields.whole(message.floor, "floor", 0, next_position),
            writers=OrderedDict((each.writer, _writer(each, next_position)) for each in message.writers),
        )
    except (DecodeError, InvalidRequest) as error:
        raise Corrupt(f"a state in a control block cannot be: {error}") from error


def _writer(message: pb.LentWriter, published: int) -> Writer:
    writer_name(message.writer, "writer")
    count = fields.whole(len(message.replies), "replies", 0, REPLAY_WINDOW)
    next_seq = fields.whole(message.next_seq, "next_seq", count, _MAX_WORD)
    replies = ((next_seq - count + offset, _reply(each, published)) for offset, each in enumerate(message.replies))
    return Writer(next_seq, OrderedDict(replies))


def _reply(message: pb.LentReply, published: int) -> Reply:
    """published: the next position. An answer says nothing beyond it, or a resend would be shown what is not there."""
    first_position = fields.whole(message.first_position, "first_position", 0, published)
    return Reply(
        num_rows=fields.whole(message.num_rows, "num_rows", 0, published - first_position),
        fingerprint=message.fingerprint,
        as_of=fields.whole(message.as_of, "as_of", 0, published),
        first_position=first_position,
        begun_from=message.begun_from if message.HasField("begun_from") else None,
    )
