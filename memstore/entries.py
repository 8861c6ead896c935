"""Entries: a memory as the catalogue has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf import json_format

from memstore import wire
from memstore.errors import Corrupt, InvalidRequest
from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    from memstore.catalog import MemoryId
    from memstore.types import MemorySpec


def identity(memory: MemoryId, text: str) -> str:
    """What the files of a memory say they belong to; no two memories that ever were have the same."""
    return f"{memory.tenant}/{text}"


def text_of(spec: MemorySpec, created_at: float) -> str:
    """What the catalogue keeps of a memory. created_at: Unix seconds."""
    description = pb.MemoryDescription(spec=wire.encode_spec(spec))
    description.status.created_at.CopyFrom(wire.encode_time(created_at))
    return str(json_format.MessageToJson(description, indent=None))


def spec_of(memory: MemoryId, text: str) -> tuple[MemorySpec, float]:
    """Spec and time of creation as the catalogue has them, checked as any outside input. Raises Corrupt."""
    try:
        description = json_format.Parse(text, pb.MemoryDescription())
        spec = wire.decode_spec(description.spec)
    except (json_format.ParseError, InvalidRequest) as error:
        raise Corrupt(f"the catalogue's entry of memory {memory.name!a} is not a spec: {error}") from error
    if spec.name != memory.name:
        raise Corrupt(f"the catalogue has {spec.name!r} under {memory.name!a}")
    return spec, description.status.created_at.ToMicroseconds() / 1e6
