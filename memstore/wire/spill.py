"""Where sequences lie that have no place on the device: spec and status, both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memstore.errors import InvalidRequest
from memstore.index import INDEXES
from memstore.types import SpillPolicy, SpillSpec
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import fields, limits

if TYPE_CHECKING:
    from memstore.types import IndexKind, SpillCounts

_POLICIES: dict[int, SpillPolicy] = {
    pb.SPILL_POLICY_UNSPECIFIED: SpillPolicy.LRU,
    pb.SPILL_POLICY_LRU: SpillPolicy.LRU,
}
_POLICY_NUMBERS = {SpillPolicy.LRU: pb.SPILL_POLICY_LRU}


def decode_spill(message: pb.SpillSpec, index: IndexKind) -> SpillSpec:
    """What a memory with this index shall do with sequences beyond its places."""
    if message.policy not in _POLICIES:
        raise InvalidRequest("spec.spill.policy", f"{message.policy} is not one of {sorted(_POLICIES)}")
    most = fields.whole(message.max_sequences, "spec.spill.max_sequences", 0, limits.MAX_SPILLED)
    if most and index not in INDEXES:
        raise InvalidRequest("spec.spill", f"what {index.value} builds of old rows is not spilled with them")
    host = fields.whole(message.host_sequences, "spec.spill.host_sequences", 0, most)
    return SpillSpec(max_sequences=most, host_sequences=host, policy=_POLICIES[message.policy])


def encode_spill(spill: SpillSpec) -> pb.SpillSpec | None:
    """The same in full; None where nothing is spilled."""
    if not spill.max_sequences:
        return None
    return pb.SpillSpec(
        max_sequences=spill.max_sequences, host_sequences=spill.host_sequences, policy=_POLICY_NUMBERS[spill.policy]
    )


def encode_spill_status(counts: SpillCounts | None) -> pb.SpillStatus | None:
    """Where sequences lie."""
    if counts is None:
        return None
    return pb.SpillStatus(
        num_resident=counts.num_resident,
        num_on_host=counts.num_on_host,
        num_on_disk=counts.num_on_disk,
        host_bytes=counts.host_bytes,
        disk_bytes=counts.disk_bytes,
        spills=counts.spills,
        returns=counts.returns,
    )
