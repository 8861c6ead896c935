"""StepResult -> StepResponse, RetrieveResponse or AppendResponse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memstore.errors import QuotaExceeded
from memstore.v1 import memstore_pb2 as pb
from memstore.wire.spec import DURABILITY_NUMBERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.message import Message

    from memstore.plane import Plane
    from memstore.types import Durability, Hits, SequenceResult
    from memstore.wire.batch import StepLike

_REPLIES: dict[type[StepLike], type[pb.StepResponse | pb.RetrieveResponse | pb.AppendResponse]] = {
    pb.StepRequest: pb.StepResponse,
    pb.RetrieveRequest: pb.RetrieveResponse,
    pb.AppendRequest: pb.AppendResponse,
}


class Reply:
    """The answer to one step, made in two halves: the tensors before anything is changed, the rest after it."""

    def __init__(self, request: StepLike, plane: Plane, durability: Durability) -> None:
        """durability: what the memory promises of what is appended."""
        self._message = _REPLIES[type(request)]()
        self._plane = plane
        self._durability = DURABILITY_NUMBERS[durability]

    def carry(self, hits: Hits) -> None:
        """Takes in what was retrieved. QuotaExceeded where the rows found do not fit into one reply."""
        if not isinstance(self._message, pb.AppendResponse):
            _fill_hits(self._message.hits, hits, self._plane)

    def finish(self, sequences: Sequence[SequenceResult]) -> Message:
        """The whole message, with what happened to each sequence, in order."""
        for sequence in sequences:
            self._message.sequences.add(
                epoch=sequence.epoch,
                as_of=sequence.as_of,
                live_begin=sequence.live_begin,
                first_position=sequence.first_position,
                num_appended=sequence.num_appended,
                is_replay=sequence.is_replay,
                durability=self._durability if sequence.num_appended else pb.DURABILITY_UNSPECIFIED,
            )
        return self._message

    def discard(self) -> None:
        """Lets go of the tensors of a reply that is not sent."""
        self._plane.discard(self._message)


def _fill_hits(into: pb.Hits, hits: Hits, plane: Plane) -> None:
    """Writes the tensors in place: a message that is put into another one is copied."""
    tensors = [hits.row_splits, hits.positions, hits.index, *hits.arrays.values()]
    targets = [
        into.row_splits,
        into.positions,
        into.index,
        *(into.arrays.add(name=name).tensor for name in hits.arrays),
    ]
    if hits.scores is not None:
        tensors.append(hits.scores)
        targets.append(into.scores)
    if hits.left_out is not None:
        tensors.append(hits.left_out)
        targets.append(into.left_out)
    size = sum([tensor.nbytes for tensor in tensors])
    if size > plane.max_reply_bytes:
        raise QuotaExceeded(
            f"the reply has {size:,} bytes, at most {plane.max_reply_bytes:,}: ask for fewer hits, rows or arrays; "
            "nothing was changed",
            reply_bytes=size,
            max_reply_bytes=plane.max_reply_bytes,
        )
    plane.fill(targets, tensors)
