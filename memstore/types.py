"""The values that travel between the parts of the server: frozen, no I/O, tensors from torch.

Shapes: L layers of the request, S sequences of the batch, N rows of the batch (the sum over its sequences), k hits a
query, w neighbours a hit (window_before + 1 + window_after), U distinct rows of a reply.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY = "key"
"""The name under which the searched vectors themselves are asked for."""

NO_ROOM = (torch.OutOfMemoryError, MemoryError)
"""What torch raises where a device has no memory left, and numpy where the host has none."""

CAPTURE_ERRORS = range(900, 910)
"""cudaErrorStreamCaptureUnsupported and those after it: codes of a capture that did not come about, or of what must not
be done while another thread captures. They harm nothing else.
"""


class Metric(Enum):
    """How near two vectors are; a score is larger for a nearer row."""

    L2 = "l2"
    INNER_PRODUCT = "ip"
    COSINE = "cosine"


class IndexKind(Enum):
    """How rows are found: the first two are exact, the others search old rows in generations of their own."""

    EXACT = "exact"
    FAISS_FLAT = "faiss_flat"
    FAISS_IVF_FLAT = "faiss_ivf_flat"
    FAISS_IVF_PQ = "faiss_ivf_pq"
    FAISS_CAGRA = "faiss_cagra"


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSettings:
    """What an approximate index is built and searched with; 0 where it is chosen, or where the kind has no such thing.

    generation_rows: positions that one generation covers. nlist: lists of a generation, nprobe: those searched for a
    query. pq_m, pq_bits: codes of a row and bits of each. graph_degree: links of a row; itopk: rows that a walk keeps.
    """

    generation_rows: int = 0
    nlist: int = 0
    nprobe: int = 0
    pq_m: int = 0
    pq_bits: int = 0
    graph_degree: int = 0
    itopk: int = 0


class FirstPass(Enum):
    """What a search reads of every row: the row, or a code of it, whose best are then ranked by their rows."""

    ROWS = "rows"
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"


class Durability(Enum):
    """What survives a stop of the server."""

    VOLATILE = "volatile"
    INTERVAL = "interval"
    ALWAYS = "always"


class SpillPolicy(Enum):
    """Which of the sequences that may leave the device leaves it first."""

    LRU = "lru"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpillSpec:
    """Where sequences lie that have no place on the device.

    max_sequences: that may exist beside those that have one. host_sequences: of them that may lie in host memory; the
    others lie in files.
    """

    max_sequences: int = 0
    host_sequences: int = 0
    policy: SpillPolicy = SpillPolicy.LRU


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadSpec:
    """An array kept beside the key: `shape` elements of `dtype` an entry."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySpec:
    """What a memory is, fixed at its creation. Limits stand in the wire contract, and are checked in wire/."""

    name: str
    dim: int
    capacity: int
    max_sequences: int = 1
    num_layers: int = 1
    dtype: torch.dtype = torch.float16
    metric: Metric = Metric.L2
    index: IndexKind = IndexKind.EXACT
    first_pass: FirstPass = FirstPass.ROWS
    index_settings: IndexSettings | None = None
    durability: Durability = Durability.VOLATILE
    payloads: tuple[PayloadSpec, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    spill: SpillSpec = SpillSpec()
    idle_ttl_s: int = 0

    @property
    def total_sequences(self) -> int:
        """Sequences that can exist at once, with a place on the device or without."""
        return self.max_sequences + self.spill.max_sequences


class SequencePart(NamedTuple):
    """One sequence's part of a ragged batch; see SequencePart of the wire contract. A tuple: a step has many."""

    sequence: str
    num_rows: int
    start_of_sequence: bool = False
    epoch: int = 0
    seq: int = 0
    as_of: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieveOptions:
    """What a retrieval gives back. Two requests can be joined into one search when these are equal."""

    top_k: int
    window_before: int = 0
    window_after: int = 0
    arrays: tuple[str, ...] = (KEY,)
    omit_scores: bool = False

    @property
    def window(self) -> int:
        """Rows given for each hit."""
        return self.window_before + 1 + self.window_after


class KnownRows(NamedTuple):
    """Rows of one (layer, sequence) that who asks has already; see KnownRows of the wire contract."""

    epoch: int
    begin: int
    bits: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """Retrieve for the keys of a batch of sequences, then append them; either half may be absent.

    keys: (L, N, dim) floating, host or device, finite; read, never kept.
    payloads: name -> (L, N, *shape), all of the spec's where something is appended, else none.
    layers: memory layer of each of the L; all layers of the memory where something is appended.
    fingerprints: one number a part that stands for the content of its rows, to tell a resend from another append that
    was given the same seq; empty where nothing can be resent.
    known: rows that need not be given back, one entry for each group layer * S + sequence; empty for none.
    """

    parts: tuple[SequencePart, ...]
    layers: tuple[int, ...]
    keys: torch.Tensor
    payloads: Mapping[str, torch.Tensor] = field(default_factory=dict)
    retrieve: RetrieveOptions | None = None
    append: bool = False
    writer: str = ""
    fingerprints: tuple[int, ...] = ()
    known: tuple[KnownRows, ...] = ()


class SequenceResult(NamedTuple):
    """What happened to one sequence; see SequenceResult of the wire contract. A tuple: a step gives many."""

    epoch: int
    as_of: int
    live_begin: int
    first_position: int
    num_appended: int = 0
    is_replay: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """What a batch retrieved, each distinct row once, on the memory's device.

    row_splits: (L * S + 1,) int64; rows of group layer * S + sequence, sorted by position within it.
    positions: (U,) int64. index: (L, N, k, w) int32 into the rows, -1 where there is none.
    scores: (L, N, k) float32, best first, -inf where there is no hit; None if not asked for.
    arrays: name -> (U, ...) in the memory's dtype, less the rows that are left out.
    left_out: (U,) uint8, 1 for each row that is not in the arrays, as who asks has it; None where all are in them.
    """

    row_splits: torch.Tensor
    positions: torch.Tensor
    index: torch.Tensor
    scores: torch.Tensor | None
    arrays: Mapping[str, torch.Tensor]
    left_out: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One SequenceResult a part, in order, and what was retrieved."""

    sequences: tuple[SequenceResult, ...]
    hits: Hits | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexCounts:
    """What an index holds at one moment, and its builds since it exists. Rows are counted over all layers.

    num_generations: that are searched. tail_rows: live rows that are in none of them, and are scanned. Builds put off
    are those that failed or found no memory: they are tried again.
    """

    num_generations: int
    tail_rows: int
    builds_under_way: int
    builds_done: int
    builds_put_off: int
    build_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SpillCounts:
    """Where the sequences of a memory lie at one moment, and how often they moved since it is here.

    host_bytes: reserved in host memory. disk_bytes: of files now. refusals: times that a file could not be written.
    """

    num_resident: int
    num_on_host: int
    num_on_disk: int
    host_bytes: int
    disk_bytes: int
    spills: int
    returns: int
    refusals: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCounts:
    """What a memory holds at one moment; rows are counted over all layers. index: None where it keeps nothing.

    expired_sequences: that were ended for being idle, since the memory is here. spill: None where nothing is spilled.
    """

    num_sequences: int
    num_rows: int
    reserved_bytes: int
    appended_rows: int
    evicted_rows: int
    index: IndexCounts | None = None
    num_pinned: int = 0
    expired_sequences: int = 0
    spill: SpillCounts | None = None
