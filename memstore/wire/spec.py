"""What a memory is, and what it holds: spec, status and description, both ways."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import torch
from google.protobuf.timestamp_pb2 import Timestamp

from memstore.errors import InvalidRequest
from memstore.index.settings import SETTINGS
from memstore.plane import DATA_TYPES, DTYPES
from memstore.types import Durability, FirstPass, IndexKind, MemorySpec, Metric, PayloadSpec
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import fields, limits
from memstore.wire.index_settings import decode_settings, encode_index_status, encode_settings
from memstore.wire.spill import decode_spill, encode_spill, encode_spill_status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memstore.types import MemoryCounts

T = TypeVar("T")
_METRICS: dict[int, Metric] = {
    pb.METRIC_UNSPECIFIED: Metric.L2,
    pb.METRIC_L2: Metric.L2,
    pb.METRIC_INNER_PRODUCT: Metric.INNER_PRODUCT,
    pb.METRIC_COSINE: Metric.COSINE,
}
_INDICES: dict[int, IndexKind] = {
    pb.INDEX_KIND_UNSPECIFIED: IndexKind.EXACT,
    pb.INDEX_KIND_EXACT: IndexKind.EXACT,
    pb.INDEX_KIND_FAISS_FLAT: IndexKind.FAISS_FLAT,
    pb.INDEX_KIND_FAISS_IVF_FLAT: IndexKind.FAISS_IVF_FLAT,
    pb.INDEX_KIND_FAISS_IVF_PQ: IndexKind.FAISS_IVF_PQ,
    pb.INDEX_KIND_FAISS_CAGRA: IndexKind.FAISS_CAGRA,
}
_KEY_DTYPES: dict[int, torch.dtype] = {
    pb.DATA_TYPE_UNSPECIFIED: torch.float16,
    pb.DATA_TYPE_FP32: torch.float32,
    pb.DATA_TYPE_FP16: torch.float16,
    pb.DATA_TYPE_BF16: torch.bfloat16,
}
_PAYLOAD_DTYPES: dict[int, torch.dtype] = dict(DTYPES.items())
_FIRST_PASSES: dict[int, FirstPass] = {
    pb.FIRST_PASS_UNSPECIFIED: FirstPass.ROWS,
    pb.FIRST_PASS_ROWS: FirstPass.ROWS,
    pb.FIRST_PASS_INT8: FirstPass.INT8,
    pb.FIRST_PASS_INT4: FirstPass.INT4,
    pb.FIRST_PASS_INT2: FirstPass.INT2,
}
_FIRST_PASS_NUMBERS = {
    FirstPass.ROWS: pb.FIRST_PASS_ROWS,
    FirstPass.INT8: pb.FIRST_PASS_INT8,
    FirstPass.INT4: pb.FIRST_PASS_INT4,
    FirstPass.INT2: pb.FIRST_PASS_INT2,
}
_POLICIES: dict[int, str] = {pb.EVICTION_POLICY_UNSPECIFIED: "fifo", pb.EVICTION_POLICY_FIFO: "fifo"}
_DURABILITIES: dict[int, Durability] = {
    pb.DURABILITY_UNSPECIFIED: Durability.VOLATILE,
    pb.DURABILITY_VOLATILE: Durability.VOLATILE,
    pb.DURABILITY_INTERVAL: Durability.INTERVAL,
    pb.DURABILITY_ALWAYS: Durability.ALWAYS,
}
DURABILITY_NUMBERS = {
    Durability.VOLATILE: pb.DURABILITY_VOLATILE,
    Durability.INTERVAL: pb.DURABILITY_INTERVAL,
    Durability.ALWAYS: pb.DURABILITY_ALWAYS,
}
_METRIC_NUMBERS = {
    Metric.L2: pb.METRIC_L2,
    Metric.INNER_PRODUCT: pb.METRIC_INNER_PRODUCT,
    Metric.COSINE: pb.METRIC_COSINE,
}
_INDEX_NUMBERS = {
    IndexKind.EXACT: pb.INDEX_KIND_EXACT,
    IndexKind.FAISS_FLAT: pb.INDEX_KIND_FAISS_FLAT,
    IndexKind.FAISS_IVF_FLAT: pb.INDEX_KIND_FAISS_IVF_FLAT,
    IndexKind.FAISS_IVF_PQ: pb.INDEX_KIND_FAISS_IVF_PQ,
    IndexKind.FAISS_CAGRA: pb.INDEX_KIND_FAISS_CAGRA,
}


def decode_spec(spec: pb.MemorySpec) -> MemorySpec:
    """A spec with its defaults filled in, every limit checked."""
    _choice(_POLICIES, spec.policy, "spec.policy")
    index = _choice(_INDICES, spec.index, "spec.index")
    dim = fields.whole(spec.dim, "spec.dim", 1, limits.MAX_DIM)
    most = limits.MAX_LARGE_CAPACITY if index in SETTINGS else limits.MAX_CAPACITY
    capacity = fields.whole(spec.capacity, "spec.capacity", 1, most)
    return MemorySpec(
        name=fields.memory_name(spec.name, "spec.name"),
        dim=dim,
        capacity=capacity,
        max_sequences=fields.whole(spec.max_sequences or 1, "spec.max_sequences", 1, limits.MAX_SEQUENCES),
        num_layers=fields.whole(spec.num_layers or 1, "spec.num_layers", 1, limits.MAX_LAYERS),
        dtype=_choice(_KEY_DTYPES, spec.dtype, "spec.dtype"),
        metric=_choice(_METRICS, spec.metric, "spec.metric"),
        index=index,
        first_pass=_first_pass(spec, index),
        index_settings=decode_settings(spec.index_settings, index, capacity, dim),
        durability=_choice(_DURABILITIES, spec.durability, "spec.durability"),
        payloads=_payloads(spec),
        tags=_tags(spec.tags),
        spill=decode_spill(spec.spill, index),
        idle_ttl_s=fields.whole(spec.idle_ttl_s, "spec.idle_ttl_s", 0, limits.MAX_IDLE_TTL_S),
    )


def _first_pass(spec: pb.MemorySpec, index: IndexKind) -> FirstPass:
    first_pass = _choice(_FIRST_PASSES, spec.first_pass, "spec.first_pass")
    if first_pass is not FirstPass.ROWS and index is not IndexKind.EXACT:
        raise InvalidRequest("spec.first_pass", f"{index.value} reads no codes of {first_pass.value}")
    return first_pass


def _choice(choices: Mapping[int, T], value: int, field: str) -> T:
    if value not in choices:
        raise InvalidRequest(field, f"{value} is not one of {sorted(choices)}")
    return choices[value]


def _payloads(spec: pb.MemorySpec) -> tuple[PayloadSpec, ...]:
    if len(spec.payloads) > limits.MAX_PAYLOADS:
        raise InvalidRequest("spec.payloads", f"{len(spec.payloads)} arrays, at most {limits.MAX_PAYLOADS}")
    payloads = tuple(_payload(payload, f"spec.payloads[{i}]") for i, payload in enumerate(spec.payloads))
    if len({payload.name for payload in payloads}) < len(payloads):
        raise InvalidRequest("spec.payloads", "two arrays of one name")
    return payloads


def _payload(payload: pb.PayloadSpec, field: str) -> PayloadSpec:
    name = fields.payload_name(payload.name, f"{field}.name")
    dtype = _choice(_PAYLOAD_DTYPES, payload.dtype, f"{field}.dtype")
    shape = tuple(payload.shape)
    if not 1 <= len(shape) <= limits.MAX_PAYLOAD_DIMS or min(shape) < 1:
        raise InvalidRequest(f"{field}.shape", f"{list(shape)}: 1 to {limits.MAX_PAYLOAD_DIMS} extents, each 1 or more")
    if math.prod(shape) * dtype.itemsize > limits.MAX_PAYLOAD_BYTES:
        raise InvalidRequest(
            f"{field}.shape", f"{list(shape)}: an entry has at most {limits.MAX_PAYLOAD_BYTES:,} bytes"
        )
    return PayloadSpec(name=name, dtype=dtype, shape=shape)


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    if len(tags) > limits.MAX_TAGS:
        raise InvalidRequest("spec.tags", f"{len(tags)} tags, at most {limits.MAX_TAGS}")
    for key, value in tags.items():
        if not 1 <= len(key) <= limits.MAX_TAG_KEY:
            raise InvalidRequest("spec.tags", f"{fields.clipped(key)}: keys have 1 to {limits.MAX_TAG_KEY} characters")
        if len(value) > limits.MAX_TAG_VALUE:
            raise InvalidRequest("spec.tags", f"{fields.clipped(key)}: values have at most {limits.MAX_TAG_VALUE}")
    return dict(tags)


def encode_spec(spec: MemorySpec) -> pb.MemorySpec:
    """The spec in full, defaults written out."""
    payloads = [
        pb.PayloadSpec(name=each.name, dtype=DATA_TYPES[each.dtype], shape=each.shape) for each in spec.payloads
    ]
    return pb.MemorySpec(
        name=spec.name,
        dim=spec.dim,
        capacity=spec.capacity,
        max_sequences=spec.max_sequences,
        num_layers=spec.num_layers,
        dtype=DATA_TYPES[spec.dtype],
        metric=_METRIC_NUMBERS[spec.metric],
        index=_INDEX_NUMBERS[spec.index],
        first_pass=_FIRST_PASS_NUMBERS[spec.first_pass],
        index_settings=encode_settings(spec.index_settings),
        policy=pb.EVICTION_POLICY_FIFO,
        durability=DURABILITY_NUMBERS[spec.durability],
        payloads=payloads,
        tags=spec.tags,
        spill=encode_spill(spec.spill),
        idle_ttl_s=spec.idle_ttl_s,
    )


def encode_description(spec: MemorySpec, counts: MemoryCounts, created_at: float, device: str) -> pb.MemoryDescription:
    """Spec and status of a loaded memory. created_at: Unix seconds."""
    status = pb.MemoryStatus(
        num_sequences=counts.num_sequences,
        num_rows=counts.num_rows,
        reserved_bytes=counts.reserved_bytes,
        appended_rows=counts.appended_rows,
        evicted_rows=counts.evicted_rows,
        created_at=encode_time(created_at),
        device=device,
        index=encode_index_status(counts.index),
        spill=encode_spill_status(counts.spill),
        num_pinned=counts.num_pinned,
        expired_sequences=counts.expired_sequences,
    )
    return pb.MemoryDescription(spec=encode_spec(spec), status=status)


def encode_time(seconds: float) -> Timestamp:
    """Unix seconds as the wire has them, to the microsecond."""
    stamp = Timestamp()
    stamp.FromMicroseconds(int(seconds * 1e6))
    return stamp
