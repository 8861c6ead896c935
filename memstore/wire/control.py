"""Reset and Fork, both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memstore.errors import InvalidRequest
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import limits
from memstore.wire.batch import sequence_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memstore.types import SequenceResult


def sequence_names(names: Sequence[str], field: str) -> list[str]:
    """1 to 4,096 names of sequences, each at most once."""
    if not 1 <= len(names) <= limits.MAX_PARTS:
        raise InvalidRequest(field, f"{len(names)} sequences, 1 to {limits.MAX_PARTS:,} at once")
    checked = [sequence_name(name, f"{field}[{i}]") for i, name in enumerate(names)]
    if len(set(checked)) < len(checked):
        raise InvalidRequest(field, "a sequence stands there twice")
    return checked


def decode_fork(request: pb.ForkRequest) -> tuple[str, str, int | None]:
    """Source, target and as_of of a fork."""
    as_of = request.as_of if request.HasField("as_of") else None
    if as_of is not None and as_of < 0:
        raise InvalidRequest("as_of", f"{as_of} is below 0")
    source = sequence_name(request.source, "source")
    target = sequence_name(request.target, "target")
    if source == target:
        raise InvalidRequest("target", "the source itself; give the new sequence another name")
    return source, target, as_of


def encode_fork(result: SequenceResult) -> pb.ForkResponse:
    """What a fork made; first_position is the target's next one, as nothing was appended."""
    return pb.ForkResponse(epoch=result.epoch, next_position=result.first_position, live_begin=result.live_begin)
