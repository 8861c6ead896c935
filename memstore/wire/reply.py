"""StepResult -> StepResponse, RetrieveResponse or AppendResponse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memstore.errors import QuotaExceeded
from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    from memstore.plane import Plane
    from memstore.types import Hits, SequenceResult, StepResult


def encode_step(result: StepResult, plane: Plane) -> pb.StepResponse:
    """What a step found and did; QuotaExceeded when the rows found do not fit into one reply."""
    response = pb.StepResponse(sequences=encode_sequences(result))
    if result.hits is not None:
        _fill_hits(response.hits, result.hits, plane)
    return response


def encode_retrieve(result: StepResult, plane: Plane) -> pb.RetrieveResponse:
    """What was retrieved; errors as encode_step."""
    response = pb.RetrieveResponse(sequences=encode_sequences(result))
    if result.hits is not None:
        _fill_hits(response.hits, result.hits, plane)
    return response


def encode_append(result: StepResult, plane: Plane) -> pb.AppendResponse:
    """What an append did; no tensors, so that no plane is used."""
    del plane
    return pb.AppendResponse(sequences=encode_sequences(result))


def encode_sequences(result: StepResult) -> list[pb.SequenceResult]:
    """What happened to each sequence, in order."""
    return [_encode_sequence(sequence) for sequence in result.sequences]


def _encode_sequence(sequence: SequenceResult) -> pb.SequenceResult:
    return pb.SequenceResult(
        epoch=sequence.epoch,
        as_of=sequence.as_of,
        live_begin=sequence.live_begin,
        first_position=sequence.first_position,
        num_appended=sequence.num_appended,
        is_replay=sequence.is_replay,
        durability=pb.DURABILITY_VOLATILE if sequence.num_appended else pb.DURABILITY_UNSPECIFIED,
    )


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
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > plane.max_reply_bytes:
        raise QuotaExceeded(
            f"the reply has {size:,} bytes, at most {plane.max_reply_bytes:,}: ask for fewer hits, rows or arrays; "
            "what was to be appended is appended",
            reply_bytes=size,
            max_reply_bytes=plane.max_reply_bytes,
        )
    plane.fill(targets, tensors)
