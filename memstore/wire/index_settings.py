"""Settings of approximate indexes, both ways: each within its limits, and what they demand of each other."""

from __future__ import annotations

from dataclasses import fields as fields_of
from typing import TYPE_CHECKING

from memstore.errors import InvalidRequest
from memstore.index.settings import SETTINGS, filled_in
from memstore.types import IndexKind, IndexSettings
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import fields, limits

if TYPE_CHECKING:
    from memstore.types import IndexCounts

_NAMES = tuple(field.name for field in fields_of(IndexSettings))
_LIMITS = {
    "generation_rows": (limits.MIN_GENERATION_ROWS, limits.MAX_GENERATION_ROWS),
    "nlist": (1, limits.MAX_NLIST),
    "nprobe": (1, limits.MAX_NPROBE),
    "pq_m": (1, limits.MAX_PQ_M),
    "pq_bits": (limits.MIN_PQ_BITS, limits.MAX_PQ_BITS),
    "graph_degree": (limits.MIN_GRAPH_DEGREE, limits.MAX_GRAPH_DEGREE),
    "itopk": (limits.MIN_ITOPK, limits.MAX_ITOPK),
}


def decode_settings(message: pb.IndexSettings, kind: IndexKind, capacity: int, dim: int) -> IndexSettings | None:
    """The settings of a memory in full; None where its index has none."""
    given = {name: getattr(message, name) for name in _NAMES if getattr(message, name)}
    known = SETTINGS.get(kind, ())
    for name, value in given.items():
        if name not in known:
            raise InvalidRequest(_field(name), f"an index of kind {kind.value} has no such setting")
        fields.whole(value, _field(name), *_LIMITS[name])
    if not known:
        return None
    settings = filled_in(kind, IndexSettings(**given), capacity, dim)
    _check(settings, dim)
    return settings


def _field(name: str) -> str:
    return f"spec.index_settings.{name}"


def _check(settings: IndexSettings, dim: int) -> None:
    """A build may get half of the rows of a generation, and needs some for each list, code and link."""
    rows, nlist, degree = settings.generation_rows, settings.nlist, settings.graph_degree
    if nlist:
        fields.whole(nlist, _field("nlist"), 1, rows // 2)
        fields.whole(settings.nprobe, _field("nprobe"), 1, nlist)
    if settings.pq_m:
        if 2 << settings.pq_bits > rows:
            raise InvalidRequest(_field("pq_bits"), f"2^{settings.pq_bits} is more than half of {rows} generation_rows")
        if dim % settings.pq_m:
            raise InvalidRequest(_field("pq_m"), f"{settings.pq_m} does not divide dim, {dim}")
    if degree:
        fields.whole(degree, _field("graph_degree"), limits.MIN_GRAPH_DEGREE, rows // 4)
        if degree % 2:
            raise InvalidRequest(_field("graph_degree"), f"{degree} is not even")


def encode_settings(settings: IndexSettings | None) -> pb.IndexSettings | None:
    """The settings in full."""
    return None if settings is None else pb.IndexSettings(**{name: getattr(settings, name) for name in _NAMES})


def encode_index_status(counts: IndexCounts | None) -> pb.IndexStatus | None:
    """What an index holds, if it keeps anything."""
    if counts is None:
        return None
    return pb.IndexStatus(
        num_generations=counts.num_generations,
        tail_rows=counts.tail_rows,
        builds_under_way=counts.builds_under_way,
        builds_done=counts.builds_done,
        builds_put_off=counts.builds_put_off,
        build_seconds=counts.build_seconds,
    )
