"""Step, Retrieve and Append requests -> StepBatch: all of a request is checked before any of it is used."""

from __future__ import annotations

import itertools
import zlib
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from memstore.errors import InvalidRequest
from memstore.plane import bytes_of
from memstore.types import KEY, KnownRows, MemorySpec, RetrieveOptions, SequencePart, StepBatch
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import fields, limits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from memstore.plane import Plane

StepLike = pb.StepRequest | pb.RetrieveRequest | pb.AppendRequest
_KEY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Ask(NamedTuple):
    """What the three kinds of request have in common. A tuple: every step makes one."""

    layers: Sequence[int]
    retrieve: pb.RetrieveOptions | None
    append: bool
    writer: str
    payloads: Sequence[pb.NamedTensor]


def _ask(request: StepLike) -> _Ask:
    match request:
        case pb.StepRequest():
            return _Ask(
                layers=request.layers,
                retrieve=request.retrieve if request.HasField("retrieve") else None,
                append=request.append,
                writer=request.writer,
                payloads=request.payloads,
            )
        case pb.RetrieveRequest():
            if not request.HasField("retrieve"):
                raise InvalidRequest("retrieve", "missing")
            return _Ask(layers=request.layers, retrieve=request.retrieve, append=False, writer="", payloads=())
        case pb.AppendRequest():
            return _Ask(layers=(), retrieve=None, append=True, writer=request.writer, payloads=request.payloads)


def decode_batch(request: StepLike, spec: MemorySpec, plane: Plane) -> StepBatch:
    """The batch of a request to the memory `spec`; its tensors share the request's bytes where the plane allows."""
    ask = _ask(request)
    parts = _parts(request.sequences)
    layers = _layers(ask, spec)
    retrieve = None if ask.retrieve is None else _retrieve(ask.retrieve, spec)
    writer = fields.printable(ask.writer, "writer", 0, limits.MAX_WRITER_NAME)
    num_rows = sum(part.num_rows for part in parts)
    if retrieve is not None:
        _check_reply_size(retrieve, len(layers) * num_rows, plane)
    keys = _keys(request, (len(layers), num_rows, spec.dim), plane)
    content = None if keys.is_cuda else bytes_of(keys)
    _check_magnitude(keys, content, spec.dtype if ask.append else None)
    payloads = _payloads(ask, spec, (len(layers), num_rows), plane)
    fingerprints: tuple[int, ...] = ()
    if plane.has_bytes and ask.append and writer and content is not None:  # or else nothing can be sent again
        contents = content, *map(bytes_of, payloads.values())
        fingerprints = _fingerprints(parts, len(layers), num_rows, contents)
    return StepBatch(
        parts=parts,
        layers=layers,
        keys=keys,
        payloads=payloads,
        retrieve=retrieve,
        append=ask.append,
        writer=writer,
        fingerprints=fingerprints,
        known=() if ask.retrieve is None else _known(ask.retrieve.known, len(layers) * len(parts)),
    )


def _parts(sequences: Sequence[pb.SequencePart]) -> tuple[SequencePart, ...]:
    if not 1 <= len(sequences) <= limits.MAX_PARTS:
        raise InvalidRequest("sequences", f"{len(sequences)} sequences, 1 to {limits.MAX_PARTS:,} in a batch")
    most, parts = limits.MAX_SEQUENCE_NAME, list[SequencePart]()
    for part in sequences:
        name, num_rows, seq = part.sequence, part.num_rows, part.seq
        as_of = part.as_of if part.HasField("as_of") else None
        if not (0 < len(name) <= most and name.isascii() and name.isprintable()):
            sequence_name(name, f"sequences[{len(parts)}].sequence")
        if num_rows < 0 or seq < 0 or (as_of is not None and as_of < 0):
            raise InvalidRequest(f"sequences[{len(parts)}]", "num_rows, seq and as_of are 0 or more")
        parts.append(SequencePart(name, num_rows, part.start_of_sequence, part.epoch, seq, as_of))
    if len({part.sequence for part in parts}) < len(parts):
        raise InvalidRequest("sequences", "a sequence stands in the batch twice")
    return tuple(parts)


def sequence_name(value: str, field: str) -> str:
    """1 to 128 printable ASCII characters."""
    return fields.printable(value, field, 1, limits.MAX_SEQUENCE_NAME)


def _layers(ask: _Ask, spec: MemorySpec) -> tuple[int, ...]:
    every = tuple(range(spec.num_layers))
    layers = tuple(ask.layers)
    if not layers:
        return every
    if any(a >= b for a, b in itertools.pairwise(layers)):
        raise InvalidRequest("layers", "ascending and without repeats")
    if layers[0] < 0 or layers[-1] >= spec.num_layers:
        raise InvalidRequest("layers", f"the memory has layers 0 to {spec.num_layers - 1}")
    if ask.append and layers != every:
        raise InvalidRequest("layers", f"an append is for all {spec.num_layers} layers of the memory")
    return layers


def _retrieve(options: pb.RetrieveOptions, spec: MemorySpec) -> RetrieveOptions:
    arrays = tuple(options.arrays)
    known = {KEY, *(payload.name for payload in spec.payloads)}
    for name in arrays:
        if name not in known:
            raise InvalidRequest("retrieve.arrays", f"{fields.clipped(name)} is not one of {sorted(known)}")
    if len(set(arrays)) < len(arrays):
        raise InvalidRequest("retrieve.arrays", "an array stands there twice")
    return RetrieveOptions(
        top_k=fields.whole(options.top_k, "retrieve.top_k", 1, limits.MAX_TOP_K),
        window_before=fields.whole(options.window_before, "retrieve.window_before", 0, limits.MAX_WINDOW_SIDE),
        window_after=fields.whole(options.window_after, "retrieve.window_after", 0, limits.MAX_WINDOW_SIDE),
        arrays=arrays,
        omit_scores=options.omit_scores,
    )


def _known(groups: Sequence[pb.KnownRows], num_groups: int) -> tuple[KnownRows, ...]:
    if len(groups) not in (0, num_groups):
        raise InvalidRequest("retrieve.known", f"{len(groups)} entries, none or {num_groups} expected: one a group")
    known = tuple(KnownRows(group.epoch, group.begin, group.bits) for group in groups)
    for i, group in enumerate(known):
        if not 0 <= group.begin <= limits.MAX_POSITION:
            raise InvalidRequest(f"retrieve.known[{i}].begin", f"0 to {limits.MAX_POSITION:,}")
    return known


def _check_reply_size(options: RetrieveOptions, num_queries: int, plane: Plane) -> None:
    """Bounds the part of a reply whose size the request decides: 4 bytes a neighbour, and 4 a score."""
    size = num_queries * options.top_k * (options.window + (not options.omit_scores)) * 4
    if size > plane.max_reply_bytes:
        raise InvalidRequest(
            "retrieve",
            f"index and scores of {num_queries} queries x {options.top_k} hits x {options.window} neighbours have "
            f"{size:,} bytes, at most {plane.max_reply_bytes:,}; ask for fewer rows at once",
        )


def _keys(request: StepLike, shape: tuple[int, int, int], plane: Plane) -> torch.Tensor:
    """The keys, of this shape; whether they are finite is still to be asked."""
    if not request.HasField("keys"):
        raise InvalidRequest("keys", "missing")
    message = request.keys
    if tuple(message.shape) != shape:
        raise InvalidRequest(
            "keys.shape", f"{list(message.shape)} given, {list(shape)} expected: [layers, rows of all sequences, dim]"
        )
    keys = plane.read(message, "keys")
    if keys.dtype not in _KEY_DTYPES:
        raise InvalidRequest("keys.dtype", f"{keys.dtype}: keys are FP32, FP16 or BF16")
    return keys


def _check_magnitude(keys: torch.Tensor, content: memoryview | None, stored: torch.dtype | None) -> None:
    """InvalidRequest unless all keys are finite, and within the range of `stored` where they are to be kept.

    content: their bytes where they are on the host.
    """
    kept = keys.dtype if stored is None else stored
    if content is None:
        is_within = not keys.numel() or largest(keys) <= _most(kept)
    else:
        is_within = not content or _is_within(content, keys.dtype, _most(kept))
    if not is_within:
        raise InvalidRequest("keys", f"an element is NaN, infinite or beyond +-{_most(kept):g}")


@cache
def _most(stored: torch.dtype) -> float:
    """The largest magnitude of an element that may be kept so."""
    return min(limits.MAX_KEY_ABS, torch.finfo(stored).max)


def _is_within(content: memoryview, dtype: torch.dtype, most: float) -> bool:
    """True where every element is a number from -most to most. Its bits are asked, whose order is that of magnitudes.

    Those of NaN come after those of infinity.
    """
    bits: NDArray[Any] = np.frombuffer(content, np.int16 if dtype.itemsize == 2 else np.int32)
    without_sign = bits & (0x7FFF if dtype.itemsize == 2 else 0x7FFFFFFF)
    return int(np.maximum.reduce(without_sign)) <= _largest_bits(dtype, most)


def largest(keys: torch.Tensor) -> float:
    """The largest magnitude of some elements, NaN where one is NaN: one kernel and one wait on a GPU."""
    return float(torch.linalg.vector_norm(keys, float("inf")))


@cache
def _largest_bits(dtype: torch.dtype, most: float) -> int:
    """The bits of the largest number of this format that is not above `most`."""
    nearest = torch.tensor(most, dtype=torch.float64).to(dtype)
    bits = nearest.view(torch.int16 if dtype.itemsize == 2 else torch.int32).item()
    return int(bits) - (nearest.item() > most)


def _payloads(ask: _Ask, spec: MemorySpec, rows: Sequence[int], plane: Plane) -> dict[str, torch.Tensor]:
    expected = {payload.name: payload for payload in spec.payloads} if ask.append else {}
    names = [named.name for named in ask.payloads]
    if sorted(names) != sorted(expected):
        given = [fields.clipped(name) for name in names[: limits.MAX_PAYLOADS + 1]]
        raise InvalidRequest("payloads", f"{given} given, each of {sorted(expected)} expected once")
    payloads: dict[str, torch.Tensor] = {}
    for i, named in enumerate(ask.payloads):
        payload = expected[named.name]
        tensor = plane.read(named.tensor, f"payloads[{i}].tensor")
        shape = (*rows, *payload.shape)
        if tuple(tensor.shape) != shape or tensor.dtype != payload.dtype:
            problem = f"{list(tensor.shape)} {tensor.dtype} given, {list(shape)} {payload.dtype} expected"
            raise InvalidRequest(f"payloads[{i}].tensor", problem)
        payloads[named.name] = tensor
    return {name: payloads[name] for name in expected}


def _fingerprints(
    parts: Sequence[SequencePart], num_layers: int, num_rows: int, contents: Sequence[memoryview]
) -> tuple[int, ...]:
    """CRC-32 of each part's rows in every array and layer, in the order of the spec. contents: of the arrays, whole."""
    layers: list[tuple[memoryview, int]] = []
    for content in contents:
        layer_bytes = len(content) // num_layers
        row_bytes = layer_bytes // max(num_rows, 1)
        layers += [(content[at : at + layer_bytes], row_bytes) for at in range(0, len(content), layer_bytes or 1)]
    fingerprints, begin = [], 0
    for part in parts:
        end = begin + part.num_rows
        value = 0
        for content, row_bytes in layers:
            value = zlib.crc32(content[begin * row_bytes : end * row_bytes], value)
        fingerprints.append(value)
        begin = end
    return tuple(fingerprints)
