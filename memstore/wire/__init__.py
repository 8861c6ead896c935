"""wire: proto <-> types. The only decoder and the only validator of outside input."""

from memstore.wire.batch import StepLike, decode_batch
from memstore.wire.control import decode_fork, encode_fork, sequence_names
from memstore.wire.crowd import is_crowd
from memstore.wire.fields import memory_name
from memstore.wire.frames import answer_frames, failure_frame, piece_bytes
from memstore.wire.lent import decode_mapped, found_states, leave_states, writer_name
from memstore.wire.limits import MAX_MESSAGE_BYTES, MAX_MESSAGE_PARTS
from memstore.wire.reply import Reply
from memstore.wire.spec import decode_spec, encode_description, encode_spec, encode_time

__all__ = [
    "MAX_MESSAGE_BYTES",
    "MAX_MESSAGE_PARTS",
    "Reply",
    "StepLike",
    "answer_frames",
    "decode_batch",
    "decode_fork",
    "decode_mapped",
    "decode_spec",
    "encode_description",
    "encode_fork",
    "encode_spec",
    "encode_time",
    "failure_frame",
    "found_states",
    "is_crowd",
    "leave_states",
    "memory_name",
    "piece_bytes",
    "sequence_names",
    "writer_name",
]
