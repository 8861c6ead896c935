"""Plane: how tensors travel beside the control messages; from message to torch and back."""

from __future__ import annotations

import functools
import itertools
import math
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from memstore.errors import InvalidRequest
from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from google.protobuf.descriptor import Descriptor, FieldDescriptor
    from google.protobuf.message import Message

MAX_TENSOR_DIMS = 8
_ALIGNMENT = 64
"""What is staged begins at multiples of this."""
MAX_EXTENTS = 1 << 48
"""Product of the extents of a tensor without elements, those that are 0 left out: torch multiplies them in 64 bits."""
DTYPES: dict[pb.DataType.ValueType, torch.dtype] = {
    pb.DATA_TYPE_FP32: torch.float32,
    pb.DATA_TYPE_FP16: torch.float16,
    pb.DATA_TYPE_BF16: torch.bfloat16,
    pb.DATA_TYPE_INT64: torch.int64,
    pb.DATA_TYPE_INT32: torch.int32,
    pb.DATA_TYPE_INT8: torch.int8,
    pb.DATA_TYPE_UINT8: torch.uint8,
}
DATA_TYPES = {dtype: data_type for data_type, dtype in DTYPES.items()}

with warnings.catch_warnings():
    # Rows of a request are read only, so that they may share the message's bytes. Torch says once a process that it
    # does not know about that; here it says so to nobody.
    warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
    torch.frombuffer(b"\0", dtype=torch.uint8)


class Plane(Protocol):
    """One way for tensors to travel. Thread safe."""

    @property
    def kind(self) -> pb.Plane.ValueType:
        """Its name on the wire."""

    @property
    def max_reply_bytes(self) -> int:
        """The most that the tensors of one reply may have."""

    @property
    def has_bytes(self) -> bool:
        """True where a request carries its elements itself, so that the same request can come again."""

    def read(self, tensor: pb.Tensor, field: str) -> torch.Tensor:
        """The tensor that a message carries or points to; read only. InvalidRequest names `field`."""

    def write(self, tensor: torch.Tensor) -> pb.Tensor:
        """What the other end reads as this tensor."""

    def fill(self, targets: Sequence[pb.Tensor], tensors: Sequence[torch.Tensor]) -> None:
        """Writes several tensors at once into messages that are still empty, with one wait for the device at most."""

    def discard(self, message: Message) -> None:
        """Lets go of every tensor of `message` that has not been read. Nothing happens to those that were."""


def element_format(tensor: pb.Tensor, field: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """dtype and shape of a message's tensor, within their limits. InvalidRequest otherwise."""
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidRequest(f"{field}.dtype", f"{tensor.dtype} is not a data type; give one of DataType")
    shape = tuple(tensor.shape)
    if len(shape) > MAX_TENSOR_DIMS:
        raise InvalidRequest(f"{field}.shape", f"{len(shape)} extents, at most {MAX_TENSOR_DIMS}")
    if min(shape, default=0) < 0:
        raise InvalidRequest(f"{field}.shape", f"{list(shape)} has an extent below 0")
    return dtype, shape


class InlinePlane:
    """The elements lie in the message itself."""

    kind = pb.PLANE_INLINE
    has_bytes = True

    def __init__(self, max_reply_bytes: int) -> None:
        self.max_reply_bytes = max_reply_bytes

    def read(self, tensor: pb.Tensor, field: str) -> torch.Tensor:
        """Shares the message's bytes: no copy."""
        dtype, shape = element_format(tensor, field)
        if tensor.WhichOneof("payload") != "data":
            raise InvalidRequest(f"{field}.data", "missing; this connection carries tensors inline only")
        content = tensor.data
        expected = math.prod(shape) * dtype.itemsize
        if len(content) != expected:
            raise InvalidRequest(
                f"{field}.data", f"{len(content)} bytes, {expected} expected for {list(shape)} {dtype}"
            )
        if not content:
            if math.prod(max(extent, 1) for extent in shape) > MAX_EXTENTS:
                raise InvalidRequest(f"{field}.shape", f"{list(shape)}: extents but 0 give at most {MAX_EXTENTS}")
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(content, dtype=dtype).view(shape)

    def write(self, tensor: torch.Tensor) -> pb.Tensor:
        return _written(self, tensor)

    def fill(self, targets: Sequence[pb.Tensor], tensors: Sequence[torch.Tensor]) -> None:
        for target, tensor in zip(targets, on_host(tensors), strict=True):
            target.dtype = DATA_TYPES[tensor.dtype]
            target.shape.extend(tensor.shape)
            target.data = bytes_of(tensor).tobytes()

    def discard(self, message: Message) -> None:
        """Nothing is held."""


def _written(plane: Plane, tensor: torch.Tensor) -> pb.Tensor:
    target = pb.Tensor()
    plane.fill([target], [tensor])
    return target


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The elements of a tensor on the host, row-major; its own where they lie so."""
    plain = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor  # which numpy does not have
    rows = plain.detach().numpy() if plain.requires_grad else plain.numpy()
    return rows.ravel().view(np.uint8).data


def on_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same on the host. What a GPU has crosses to one piece of pinned memory, and is waited for once."""
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    if device is None:
        return list(tensors)
    staged = in_one_piece(tensors, lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True))
    torch.cuda.current_stream(device).synchronize()
    return staged


def in_one_piece(tensors: Sequence[torch.Tensor], make: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
    """Copies of tensors in one new piece of memory; by one copy where they lie in one piece, with little between them.

    make: gives (bytes,) uint8. A copy between a GPU and pinned memory may still be under way afterwards.
    """
    begins = [int(tensor.storage_offset()) * tensor.itemsize for tensor in tensors]
    sizes = [tensor.nbytes for tensor in tensors]
    first = min(begins) // _ALIGNMENT * _ALIGNMENT
    length = max(begin + size for begin, size in zip(begins, sizes, strict=True)) - first
    is_one = length <= 2 * sum(sizes) and len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    if is_one and all(tensor.is_contiguous() for tensor in tensors):
        whole = make(length)
        source = torch.empty(0, dtype=torch.uint8, device=tensors[0].device)
        whole.copy_(source.set_(tensors[0].untyped_storage(), first, (length,), (1,)), non_blocking=True)
        return [_placed(whole, begin - first, tensor) for begin, tensor in zip(begins, tensors, strict=True)]
    room = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    ends = list(itertools.accumulate(room))
    whole = make(ends[-1])
    copies = [_placed(whole, end - size, tensor) for end, size, tensor in zip(ends, room, tensors, strict=True)]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    return copies


def _placed(whole: torch.Tensor, begin: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the format of another one, in the bytes that begin there."""
    return whole[begin : begin + like.nbytes].view(like.dtype).view(like.shape)


class _Moment:
    """The moment on CUDA from which the tensors of a message may be read: what a stream has queued by now is done."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.current_stream(device).record_event()
        self._known: set[tuple[int, int, int]] = set()

    def await_for(self, tensor: torch.Tensor) -> None:
        """Has the current stream wait, and the memory of a tensor kept until that has read it: each once."""
        stream = torch.cuda.current_stream(tensor.device)
        reader = stream.device_index, stream.cuda_stream
        waited, kept = (*reader, 0), (*reader, tensor.untyped_storage().data_ptr())
        if waited not in self._known:
            stream.wait_event(self._event)
        if kept not in self._known:
            tensor.record_stream(stream)
        self._known |= {waited, kept}


@dataclass(frozen=True, slots=True)
class _Handed:
    """A tensor on its way, and on CUDA when it may be read."""

    tensor: torch.Tensor
    ready: _Moment | None


class ProcessPlane:
    """Within one process the tensor itself is handed over, by number; reading takes it out.

    On CUDA the reader's current stream waits for what the writer's stream had queued: nobody waits on the host.
    """

    kind = pb.PLANE_PROCESS
    has_bytes = False

    def __init__(self, max_reply_bytes: int = 1 << 31) -> None:
        self.max_reply_bytes = max_reply_bytes
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._regions: dict[int, _Handed] = {}

    def __len__(self) -> int:
        """Tensors that were written and not yet read or discarded."""
        return len(self._regions)

    def read(self, tensor: pb.Tensor, field: str) -> torch.Tensor:
        dtype, shape = element_format(tensor, field)
        if tensor.WhichOneof("payload") != "region" or tensor.region.plane != pb.PLANE_PROCESS:
            return self._not_handed(tensor, field)
        with self._lock:
            handed = self._regions.pop(tensor.region.region, None)
        if handed is None:
            raise InvalidRequest(f"{field}.region", f"no region {tensor.region.region}; each is read once")
        if handed.tensor.dtype != dtype or tuple(handed.tensor.shape) != shape:
            raise InvalidRequest(f"{field}.shape", f"{list(shape)} {dtype}, but the region differs")
        if handed.ready is not None:
            handed.ready.await_for(handed.tensor)
        return handed.tensor

    def _not_handed(self, tensor: pb.Tensor, field: str) -> torch.Tensor:
        """A tensor that a message does not point to here."""
        raise InvalidRequest(f"{field}.region", "missing; within one process tensors travel by region")

    def write(self, tensor: torch.Tensor) -> pb.Tensor:
        """The tensor is shared, not copied: the writer leaves it as it is from now on."""
        return _written(self, tensor)

    def fill(self, targets: Sequence[pb.Tensor], tensors: Sequence[torch.Tensor]) -> None:
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        ready = None if device is None else _Moment(device)
        for target, tensor in zip(targets, tensors, strict=True):
            target.dtype = DATA_TYPES[tensor.dtype]
            target.shape.extend(tensor.shape)
            target.region.plane = pb.PLANE_PROCESS
            target.region.length_bytes = tensor.numel() * tensor.element_size()
            target.region.region = self._keep(_Handed(tensor.detach(), ready if tensor.is_cuda else None))

    def _keep(self, handed: _Handed) -> int:
        with self._lock:
            number = next(self._numbers)
            self._regions[number] = handed
        return number

    def discard(self, message: Message) -> None:
        regions = [tensor.region for tensor in tensors_of(message) if tensor.HasField("region")]
        numbers = [region.region for region in regions if region.plane == pb.PLANE_PROCESS]
        with self._lock:
            for number in numbers:
                self._regions.pop(number, None)


class MixedPlane(ProcessPlane):
    """Within one process, but for requests whose tensors had been written into the message before."""

    def __init__(self) -> None:
        super().__init__()
        self._inline = InlinePlane(self.max_reply_bytes)

    def _not_handed(self, tensor: pb.Tensor, field: str) -> torch.Tensor:
        is_inline = tensor.WhichOneof("payload") == "data"
        return self._inline.read(tensor, field) if is_inline else super()._not_handed(tensor, field)


def tensors_of(message: Message) -> Iterator[pb.Tensor]:
    """Every tensor anywhere in a message."""
    if isinstance(message, pb.Tensor):
        yield message
        return
    for field in _fields_with_tensors(message.DESCRIPTOR):
        if field.is_repeated:
            for part in getattr(message, field.name):
                yield from tensors_of(part)
        elif message.HasField(field.name):
            yield from tensors_of(getattr(message, field.name))


@functools.cache
def _fields_with_tensors(kind: Descriptor) -> tuple[FieldDescriptor, ...]:
    """Fields of a message that are tensors or have some in them. No message of the contract contains itself."""
    return tuple(
        field
        for field in kind.fields
        if field.message_type is not None
        and (field.message_type is pb.Tensor.DESCRIPTOR or _fields_with_tensors(field.message_type))
    )


def tensor_bytes(message: Message) -> int:
    """Bytes of a message and of the tensors that it only points to."""
    away = (tensor.region.length_bytes for tensor in tensors_of(message) if tensor.HasField("region"))
    return message.ByteSize() + sum(away)
