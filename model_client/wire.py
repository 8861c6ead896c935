"""Values of the client <-> messages of the contract: what may be asked, what comes back, and tensors as bytes."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Required, TypedDict

import numpy as np
import torch

from memstore.v1 import memstore_pb2 as pb
from model_client.errors import Internal, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.message import Message
    from numpy.typing import NDArray

    from model_client.transport.base import TensorPlane

KEY = "key"
"""The name under which the searched vectors themselves are asked for."""

_TO_WIRE = {
    torch.float32: pb.DATA_TYPE_FP32,
    torch.float16: pb.DATA_TYPE_FP16,
    torch.bfloat16: pb.DATA_TYPE_BF16,
    torch.int64: pb.DATA_TYPE_INT64,
    torch.int32: pb.DATA_TYPE_INT32,
    torch.int8: pb.DATA_TYPE_INT8,
    torch.uint8: pb.DATA_TYPE_UINT8,
}
_FROM_WIRE = {code: dtype for dtype, code in _TO_WIRE.items()}

_TO_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.int64: np.dtype(np.int64),
    torch.int32: np.dtype(np.int32),
    torch.int8: np.dtype(np.int8),
    torch.uint8: np.dtype(np.uint8),
}
"""All but bfloat16, which numpy does not have."""

_METRICS = {"l2": pb.METRIC_L2, "ip": pb.METRIC_INNER_PRODUCT, "cosine": pb.METRIC_COSINE}
_FIRST_PASSES = {
    "rows": pb.FIRST_PASS_ROWS,
    "int8": pb.FIRST_PASS_INT8,
    "int4": pb.FIRST_PASS_INT4,
    "int2": pb.FIRST_PASS_INT2,
}
_DURABILITIES = {
    "volatile": pb.DURABILITY_VOLATILE,
    "interval": pb.DURABILITY_INTERVAL,
    "always": pb.DURABILITY_ALWAYS,
}
_INDEXES = {
    "exact": pb.INDEX_KIND_EXACT,
    "faiss_flat": pb.INDEX_KIND_FAISS_FLAT,
    "faiss_ivf_flat": pb.INDEX_KIND_FAISS_IVF_FLAT,
    "faiss_ivf_pq": pb.INDEX_KIND_FAISS_IVF_PQ,
    "faiss_cagra": pb.INDEX_KIND_FAISS_CAGRA,
}
_SETTINGS = sorted(pb.IndexSettings.DESCRIPTOR.fields_by_name)

with warnings.catch_warnings():
    # Torch says once a process that it does not know whether bytes may be written to; here it says so to nobody.
    warnings.filterwarnings("ignore", message="The given .* is not writable", category=UserWarning)
    torch.frombuffer(b"\0", dtype=torch.uint8)
    torch.from_numpy(np.ndarray((1,), np.uint8, b"\0"))


class MemoryOptions(TypedDict, total=False):
    """What a memory is, besides its name."""

    dim: Required[int]
    """Width of a key."""
    capacity: Required[int]
    """Entries that one layer of one sequence holds."""
    max_sequences: int
    """Sequences that can exist at once, or on the device at once where others are spilled; 1 if not given."""
    max_spilled_sequences: int
    """Sequences that can exist beside those: the least recently used ones are spilled; 0 if not given."""
    host_spilled_sequences: int
    """How many of these may lie in host memory, the others lie in files; 0 if not given."""
    idle_ttl_s: int
    """Seconds after which a sequence that nobody used ends; 0 if not given: never."""
    num_layers: int
    """Retrieval layers, each with rings of its own; 1 if not given."""
    dtype: torch.dtype
    """In which keys are kept: float16 (if not given), float32 or bfloat16."""
    metric: str
    """"l2" (if not given), "ip" or "cosine"."""
    index: str
    """"exact" (if not given), "faiss_flat", "faiss_ivf_flat", "faiss_ivf_pq" or "faiss_cagra"."""
    index_settings: Mapping[str, int]
    """What the last three are built and searched with, such as nprobe; chosen by the server where not given."""
    first_pass: str
    """What a search reads of every row: "rows" (if not given), or codes, "int8" or "int4", which may miss rows."""
    durability: str
    """What survives a stop of the server: nothing with "volatile" (if not given); with "interval" all, but for the last
    second before the machine went down; all with "always"."""
    payloads: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    """Arrays kept beside the key: name -> dtype and shape of one entry."""
    tags: Mapping[str, str]
    """Free words of the owner."""
    exist_ok: bool
    """True: an existing memory of an equal spec is given back instead of AlreadyExists."""


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What a retrieval gives back: `top_k` hits a query, each with `before` + 1 + `after` neighbours by position.

    arrays: "key" or names of the memory's payloads; empty for positions and scores only.
    """

    top_k: int
    before: int = 0
    after: int = 0
    arrays: tuple[str, ...] = (KEY,)
    scores: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """What a batch retrieved, each distinct row once, on the queries' device.

    L layers, S sequences, N queries (of all sequences, in order), k hits, w neighbours a hit, U distinct rows.
    rows: name -> (U, ...) in the memory's dtype. positions: (U,) int64, ascending within a group.
    row_splits: (L * S + 1,) int64; group layer * S + sequence has the rows [row_splits[group], row_splits[group + 1]).
    index: (L, N, k, w) int32, the number of the row; -1 where there is none.
    scores: (L, N, k) float32, best first, -inf where there is no hit; None if not asked for.
    """

    rows: Mapping[str, torch.Tensor]
    positions: torch.Tensor
    row_splits: torch.Tensor
    index: torch.Tensor
    scores: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One pb.SequenceResult for each sequence of the step, in order, and what was retrieved."""

    sequences: tuple[pb.SequenceResult, ...]
    hits: Hits | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """The tensors of one step, checked for shape. keys: (L, N, dim); payloads: name -> (L, N, ...)."""

    keys: torch.Tensor
    payloads: Mapping[str, torch.Tensor] = field(default_factory=dict)


class InlinePlane:
    """Tensors as bytes inside the message."""

    name = "inline"
    is_single_use = False

    def write(self, tensor: torch.Tensor, into: pb.Tensor) -> None:
        """One contiguous copy to the host at most, then bytes."""
        into.dtype = wire_dtype(tensor.dtype)
        into.shape[:] = tensor.shape
        into.data = _as_bytes(tensor)

    def read(self, message: pb.Tensor, device: torch.device) -> torch.Tensor:
        """A tensor of its own memory, on `device`."""
        content: bytes | bytearray = message.data  # a copy of our own, so the tensor may lie in it, and be written to
        if len(content) < 2:  # but for these, of which the interpreter has one for all
            content = bytearray(content)
        return tensor_of(message, content, 0, len(content), device)

    def discard(self, message: Message) -> None:
        """Nothing is held."""


MAX_EXTENTS = 1 << 48
"""Product of the extents of a tensor, those that are 0 left out: torch multiplies them in 64 bits."""


def tensor_of(
    message: pb.Tensor, buffer: bytes | bytearray | NDArray[np.uint8], offset: int, num_bytes: int, device: torch.device
) -> torch.Tensor:
    """The tensor that a message describes, whose elements are these bytes of a buffer. Raises Internal."""
    dtype, shape = element_format(message, offset, num_bytes)
    if not num_bytes:
        return torch.empty(shape, dtype=dtype, device=device)
    kind = _TO_NUMPY.get(dtype)
    try:
        if kind is None:
            tensor = torch.frombuffer(buffer, dtype=dtype, count=num_bytes // dtype.itemsize, offset=offset).view(shape)
        else:  # a single call of torch, which costs more than what numpy does
            tensor = torch.from_numpy(np.ndarray(shape, kind, buffer, offset))
    except (ValueError, TypeError) as error:
        raise Internal(f"the reply has a tensor beyond its bytes: {num_bytes} at {offset}") from error
    return tensor if device.type == "cpu" else tensor.to(device)


def element_format(message: pb.Tensor, offset: int, num_bytes: int) -> tuple[torch.dtype, tuple[int, ...]]:
    """dtype and shape of a tensor in a message, which fit so many bytes there. Raises Internal."""
    dtype, shape = _FROM_WIRE.get(message.dtype), tuple(message.shape)
    if dtype is None:
        raise Internal(f"the reply has a tensor of unknown dtype {message.dtype}")
    is_shape = min(shape, default=1) > 0 or _is_empty(shape)
    if not is_shape or math.prod(shape) * dtype.itemsize != num_bytes or offset < 0:
        raise Internal(f"the reply has a tensor of {num_bytes} bytes at {offset} and shape {list(shape)}")
    return dtype, shape


def _is_empty(shape: tuple[int, ...]) -> bool:
    """True for a shape without elements that torch can make."""
    return min(shape) == 0 and math.prod(max(extent, 1) for extent in shape) <= MAX_EXTENTS


def wire_dtype(dtype: torch.dtype) -> pb.DataType.ValueType:
    """The number format's name on the wire; InvalidRequest where it has none."""
    code = _TO_WIRE.get(dtype)
    if code is None:
        raise InvalidRequest(
            f"dtype: {dtype} is no dtype of torch that travels; these do: {sorted(map(str, _TO_WIRE))}"
        )
    return code


def check_options(options: Mapping[str, object], kind: type) -> None:
    """InvalidRequest where an option is given that its TypedDict has not."""
    for name in options:
        if name not in kind.__annotations__:
            raise InvalidRequest(f"{name}: there is no such option, it is none of {sorted(kind.__annotations__)}")


def memory_spec(name: str, options: MemoryOptions) -> pb.MemorySpec:
    """The spec of a memory as a message; InvalidRequest where a word is unknown. The server checks the numbers."""
    check_options(options, MemoryOptions)
    for needed in ("dim", "capacity"):
        if needed not in options:
            raise InvalidRequest(f"{needed}: needed")
    metric, index = options.get("metric", "l2"), options.get("index", "exact")
    durability = options.get("durability", "volatile")
    if metric not in _METRICS:
        raise InvalidRequest(f"metric: {metric!r} is none of {sorted(_METRICS)}")
    if index not in _INDEXES:
        raise InvalidRequest(f"index: {index!r} is none of {sorted(_INDEXES)}")
    settings = options.get("index_settings", {})
    for setting in settings:
        if setting not in _SETTINGS:
            raise InvalidRequest(f"index_settings: {setting!r} is none of {_SETTINGS}")
    first_pass = options.get("first_pass", "rows")
    if first_pass not in _FIRST_PASSES:
        raise InvalidRequest(f"first_pass: {first_pass!r} is none of {sorted(_FIRST_PASSES)}")
    if durability not in _DURABILITIES:
        raise InvalidRequest(f"durability: {durability!r} is none of {sorted(_DURABILITIES)}")
    spilled = options.get("max_spilled_sequences", 0), options.get("host_spilled_sequences", 0)
    if spilled[1] > spilled[0]:
        raise InvalidRequest(f"host_spilled_sequences: {spilled[1]} is above max_spilled_sequences, {spilled[0]}")
    return pb.MemorySpec(
        name=name,
        dim=options["dim"],
        capacity=options["capacity"],
        max_sequences=options.get("max_sequences", 1),
        num_layers=options.get("num_layers", 1),
        dtype=wire_dtype(options.get("dtype", torch.float16)),
        metric=_METRICS[metric],
        index=_INDEXES[index],
        index_settings=pb.IndexSettings(**settings) if settings else None,
        first_pass=_FIRST_PASSES[first_pass],
        durability=_DURABILITIES[durability],
        payloads=[
            pb.PayloadSpec(name=each, dtype=wire_dtype(dtype), shape=shape)
            for each, (dtype, shape) in options.get("payloads", {}).items()
        ],
        tags=options.get("tags", {}),
        spill=pb.SpillSpec(max_sequences=spilled[0], host_sequences=spilled[1]) if any(spilled) else None,
        idle_ttl_s=options.get("idle_ttl_s", 0),
    )


def step_request(
    plane: TensorPlane, memory: str, rows: StepRows, retrieve: Retrieval | None, append: bool, writer: str
) -> pb.StepRequest:
    """A step without its sequences, which are numbered just before it leaves."""
    request = pb.StepRequest(memory=memory, append=append, writer=writer if append else "")
    if retrieve is not None:
        request.retrieve.CopyFrom(retrieve_options(retrieve))
    write_rows(plane, request, rows)
    return request


def write_rows(plane: TensorPlane, request: pb.StepRequest, rows: StepRows) -> None:
    """Gives a request its tensors, in place of those it had."""
    del request.payloads[:]
    if request.append:
        for name, payload in rows.payloads.items():
            plane.write(payload, request.payloads.add(name=name).tensor)
    plane.write(rows.keys, request.keys)


def empty_like(message: pb.Tensor) -> torch.Tensor:
    """No rows of the format of a tensor [layers, rows, ...] in a message."""
    layers, _, *rest = message.shape
    return torch.empty((layers, 0, *rest), dtype=_FROM_WIRE[message.dtype])


@lru_cache(maxsize=64)
def retrieve_options(retrieve: Retrieval) -> pb.RetrieveOptions:
    """A Retrieval as a message, to be copied from."""
    return pb.RetrieveOptions(
        top_k=retrieve.top_k,
        window_before=retrieve.before,
        window_after=retrieve.after,
        arrays=retrieve.arrays,
        omit_scores=not retrieve.scores,
    )


def step_result(plane: TensorPlane, reply: pb.StepResponse, device: torch.device) -> StepResult:
    """A reply as tensors on `device`."""
    hits = read_hits(plane, reply.hits, device) if reply.HasField("hits") else None
    return StepResult(sequences=tuple(reply.sequences), hits=hits)


def left_out(plane: TensorPlane, reply: pb.StepResponse) -> torch.Tensor | None:
    """On the host, 1 for each row of a reply that is not in its arrays; None where all are in them."""
    has_all = not reply.hits.HasField("left_out")
    return None if has_all else plane.read(reply.hits.left_out, torch.device("cpu"))


def on_device(result: StepResult, device: torch.device) -> StepResult:
    """The same result with its tensors on a device."""
    if result.hits is None or result.hits.positions.device == device:
        return result
    hits = result.hits
    moved = Hits(
        rows={name: rows.to(device) for name, rows in hits.rows.items()},
        positions=hits.positions.to(device),
        row_splits=hits.row_splits.to(device),
        index=hits.index.to(device),
        scores=None if hits.scores is None else hits.scores.to(device),
    )
    return StepResult(sequences=result.sequences, hits=moved)


def read_hits(plane: TensorPlane, hits: pb.Hits, device: torch.device) -> Hits:
    """What was retrieved, as tensors on `device`."""
    return Hits(
        rows={each.name: plane.read(each.tensor, device) for each in hits.arrays},
        positions=plane.read(hits.positions, device),
        row_splits=plane.read(hits.row_splits, device),
        index=plane.read(hits.index, device),
        scores=plane.read(hits.scores, device) if hits.HasField("scores") else None,
    )


def _as_bytes(tensor: torch.Tensor) -> bytes:
    is_plain = tensor.device.type == "cpu" and not tensor.requires_grad
    host = tensor if is_plain else tensor.detach().cpu()
    plain = host.view(torch.int16) if host.dtype == torch.bfloat16 else host  # which numpy does not have
    return plain.numpy().tobytes()
