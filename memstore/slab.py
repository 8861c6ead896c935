"""The slab: the tensors that hold all rows of one memory, reserved and touched once.

    keys      (layers, places, capacity, dim)      the searched vectors in the memory's dtype
    norms     (layers, places, capacity) float32   |row|^2 for l2, 1 / |row| for cosine (0 for a zero row), none for ip
    payloads  name -> (layers, places, capacity, *shape)
    codes     (layers, places, capacity, bytes)    the vectors in few bits, where the memory has a first pass over codes
    terms     (layers, places, capacity, 2) float32, see codes.py

A place holds one sequence. Everything here is addressed by place and slot; positions are the ring's. The tensors are
private, or lie one behind the other in a region that other processes may map.
"""

from __future__ import annotations

import math
import os
import weakref
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from memstore.codes import BITS, NUM_TERMS, code_bytes, encode
from memstore.errors import DeviceMemoryFull
from memstore.region import make_region, padded, pinned
from memstore.region.base import array
from memstore.region.mapping import HUGE_BYTES
from memstore.region.own import own_memory
from memstore.types import KEY, NO_ROOM, MemorySpec, Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from memstore.region.base import Region
    from memstore.ring import Run

ALONE_BYTES = 64 << 20
"""The most that one thread copies alone within host memory, in some 8 ms. All of torch's threads are faster, but each
that has lost its core to another process is waited for, some 4 ms.
"""
NormsOf: TypeAlias = "Callable[[torch.Tensor, Metric], torch.Tensor]"
"""(layers, n, dim) as stored, and the metric -> (layers, n) float32."""
_ALIGNED = 4096
"""The arrays of a region begin at multiples of this."""
_LINE = 64
"""Those of a host's private memory begin with a cache line, or where they are large enough with a huge page."""


@dataclass(frozen=True, slots=True)
class StagedRows:
    """Rows as the slab stores them: keys (layers, n, dim), norms (layers, n), payloads (layers, n, *shape).

    coded: codes and terms, see codes.py; left out where they are still to be made.
    """

    keys: torch.Tensor
    norms: torch.Tensor | None
    payloads: Mapping[str, torch.Tensor]
    coded: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def arrays(self) -> list[torch.Tensor]:
        """All of them, in the order of a slab's."""
        norms = [] if self.norms is None else [self.norms]
        return [self.keys, *norms, *self.payloads.values(), *(self.coded or ())]

    def to(self, device: torch.device | str) -> StagedRows:
        """The same rows on a device."""
        return self._each(lambda array: array.to(device))

    def select(self, chosen: torch.Tensor) -> StagedRows:
        """Some of the rows. chosen: (n,) bool, or int64 numbers."""
        return self._each(lambda array: array[:, chosen])

    def only(self, begin: int, end: int) -> StagedRows:
        """The rows [begin, end), which share their memory with these."""
        return self._each(lambda array: array[:, begin:end])

    def put(self, places: torch.Tensor, rows: StagedRows) -> None:
        """Overwrites rows here, which are not coded yet, with those of another. places: (m,) int64."""
        self.keys[:, places] = rows.keys
        if self.norms is not None and rows.norms is not None:
            self.norms[:, places] = rows.norms
        for name, payload in self.payloads.items():
            payload[:, places] = rows.payloads[name]

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> StagedRows:
        payloads = {name: change(array) for name, array in self.payloads.items()}
        return StagedRows(change(self.keys), None if self.norms is None else change(self.norms), payloads)


class Slab:
    """Owns the storage. Raises DeviceMemoryFull at creation, never later."""

    def __init__(
        self, spec: MemorySpec, device: torch.device, *, is_shared: bool = False, region: Region | None = None
    ) -> None:
        """is_shared: in a new region. region: in this one, as it is, whose rows another process may own."""
        self.metric = spec.metric
        self.capacity = spec.capacity
        self.dim = spec.dim
        self.num_layers = spec.num_layers
        self.num_places = spec.max_sequences
        self.device, self.is_on_host = device, device.type == "cpu"
        self.region = region
        self._unpin: weakref.finalize[[], Slab] | None = None
        _check_host_room(spec, device)
        try:
            if is_shared:
                self.region = make_region(bytes_needed(spec, device, is_shared=True), device)
            tensors = self._arrays(_formats(spec))
        except (*NO_ROOM, RuntimeError, OSError) as error:
            raise DeviceMemoryFull(f"no room for {bytes_needed(spec)} bytes on {device}") from error
        self.keys = tensors.pop(0)
        self.norms = None if spec.metric is Metric.INNER_PRODUCT else tensors.pop(0)
        self.first_pass = spec.first_pass
        self.terms = tensors.pop() if BITS[spec.first_pass] else None
        self.codes = tensors.pop() if BITS[spec.first_pass] else None
        self.payloads = {payload.name: tensor for payload, tensor in zip(spec.payloads, tensors, strict=True)}
        self.cells = [as_cells(tensor) for tensor in self._tensors()] if self.is_on_host else []
        """On the host, all arrays as compiled code writes to them: (num_cells, bytes) uint8."""

    def _arrays(self, formats: Sequence[_Format]) -> list[torch.Tensor]:
        region = self.region
        if region is None:
            return [_touched(each.shape, each.dtype, self.device) for each in formats]
        return [
            array(region, offset, each.shape, each.dtype)
            for each, offset in zip(formats, _offsets(formats), strict=False)
        ]

    def stage(
        self, keys: torch.Tensor, payloads: Mapping[str, torch.Tensor], norms_of: NormsOf | None = None
    ) -> StagedRows:
        """Converts rows to what is stored. Raises torch.OutOfMemoryError, before anything is changed.

        keys: (layers, n, dim) floating, on the device; finite values beyond the range of the memory's dtype are kept
        as its largest. payloads: name -> (layers, n, *shape). norms_of: makes norms of stored keys.
        """
        stored = _rounded(keys, self.keys.dtype).contiguous()
        converted = {name: payloads[name].to(slab.dtype).contiguous() for name, slab in self.payloads.items()}
        norms = None if self.norms is None else (norms_of or _norms)(stored, self.metric)
        return self._coded(StagedRows(stored, norms, converted))

    def _coded(self, rows: StagedRows) -> StagedRows:
        """Rows with their codes, where this slab has codes."""
        if self.codes is None or rows.coded is not None:
            return rows
        return replace(rows, coded=encode(rows.keys, rows.norms, self.metric, self.first_pass))

    def write(self, rows: StagedRows, cells: torch.Tensor) -> None:
        """Overwrites cells, as `in_all_layers` gives them, all different. Takes no memory for staged rows."""
        coded = self._coded(rows).coded
        self.keys.flatten(0, 2).index_copy_(0, cells, rows.keys.flatten(0, 1))
        if self.norms is not None and rows.norms is not None:
            self.norms.flatten().index_copy_(0, cells, rows.norms.flatten())
        for name, slab in self.payloads.items():
            slab.flatten(0, 2).index_copy_(0, cells, rows.payloads[name].flatten(0, 1))
        if coded is not None and self.codes is not None and self.terms is not None:
            self.codes.flatten(0, 2).index_copy_(0, cells, coded[0].flatten(0, 1))
            self.terms.flatten(0, 2).index_copy_(0, cells, coded[1].flatten(0, 1))

    @property
    def num_cells(self) -> int:
        """Rows in all layers and places."""
        return self.num_layers * self.num_places * self.capacity

    def array(self, name: str) -> torch.Tensor:
        """The keys or a payload as they lie, (num_cells, *shape): (layer * places + place) * capacity + slot."""
        return (self.keys if name == KEY else self.payloads[name]).flatten(0, 2)

    def gather(self, name: str, cells: torch.Tensor) -> torch.Tensor:
        """Rows of the keys or a payload. cells: (U,) int64, as `array` counts them."""
        return self.array(name).index_select(0, cells)

    def rows(self, cells: torch.Tensor) -> StagedRows:
        """A copy of every array of some entries in all layers. cells: (n,) int64 of layer 0, on the device."""
        everywhere = self.in_all_layers(cells)

        def taken(tensor: torch.Tensor) -> torch.Tensor:
            chosen = tensor.flatten(0, 2).index_select(0, everywhere)
            return chosen.view(self.num_layers, len(cells), *chosen.shape[1:])

        payloads = {name: taken(slab) for name, slab in self.payloads.items()}
        return StagedRows(taken(self.keys), None if self.norms is None else taken(self.norms), payloads)

    def first_cells(self, layers: Sequence[int], places: Sequence[int]) -> NDArray[np.int64]:
        """The cell of slot 0 of each place in each layer, as `gather` counts cells, (layers, places)."""
        layer_places = np.array(layers, np.int64)[:, None] * self.num_places + np.array(places, np.int64)
        cells: NDArray[np.int64] = layer_places * self.capacity
        return cells

    def copy_place(self, source: int, target: int, slot: int, length: int, other: Slab | None = None) -> None:
        """Copies slots [slot, slot + length) of one place to the same slots of another, in every layer.

        other: the slab of the source, of an equal spec but for its places; this one if None. Between host and device
        nobody waits for the copy where the host's memory is pinned.
        """
        for ours, theirs in zip(self._tensors(), (other or self)._tensors(), strict=True):
            new, old = ours[:, target, slot : slot + length], theirs[:, source, slot : slot + length]
            if ours.device == theirs.device:
                _copy(new, old)
                continue
            for layer in range(self.num_layers):  # each is one piece of memory, on both sides
                new[layer].copy_(old[layer], non_blocking=True)

    def populate(self, places: Sequence[int]) -> None:
        """Prepares these places for this process: see Region.populate."""
        if self.region is None:
            return
        base = self.region.content.data_ptr()
        for tensor in self._tensors():
            for ring in (tensor[layer, place] for layer in range(self.num_layers) for place in places):
                self.region.populate(ring.data_ptr() - base, ring.numel() * ring.element_size())

    def parts(self, place: int, runs: Sequence[Run]) -> list[list[memoryview]]:
        """The bytes of these slots of one place as they lie in host memory, array by array, layer by layer."""
        return [
            [
                tensor[layer, place, run.slot : run.slot + run.length].view(-1).view(torch.uint8).numpy().data
                for layer in range(self.num_layers)
                for run in runs
            ]
            for tensor in self._tensors()
        ]

    def pin(self, device: torch.device) -> None:
        """Lets a GPU copy from and to this slab of the host's while nobody waits, where that can be.

        Only a slab in a region is pinned: other memory shares its first and last page with what is none of the slab's,
        and CUDA refuses to copy that, as a part of it is pinned and a part is not.
        """
        if self.region is not None:
            # also where nobody frees the slab: CUDA copies nothing that lies where pages once were pinned
            self._unpin = weakref.finalize(self, pinned(self.region.content, device))
            self._unpin.atexit = False

    def _tensors(self) -> list[torch.Tensor]:
        some = [self.keys, self.norms, *self.payloads.values(), self.codes, self.terms]
        return [tensor for tensor in some if tensor is not None]

    def free(self) -> None:
        """Gives the storage back; the slab is of no use afterwards."""
        if self._unpin is not None:
            self._unpin()
        empty = torch.empty(0)
        self.keys, self.norms, self.payloads, self.codes, self.terms = empty, None, {}, None, None
        self.cells = []
        if self.region is not None:
            self.region.close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def in_all_layers(self, cells: torch.Tensor) -> torch.Tensor:
        """Cells of layer 0, (n,) int64 place * capacity + slot, and the same of every other layer, (layers * n,)."""
        if self.num_layers == 1:
            return cells
        first_cells = torch.from_numpy(self.first_cells(range(self.num_layers), (0,))).to(cells.device)
        return (first_cells + cells).flatten()


def bytes_needed(spec: MemorySpec, device: torch.device | None = None, *, is_shared: bool = False) -> int:
    """Bytes that a slab of this spec reserves; in a region of the device where it is shared, in whole pages."""
    formats = _formats(spec)
    if is_shared and device is not None:
        return padded(_offsets(formats)[-1], device)
    return sum(each.size_bytes for each in formats)


def keys_spec(spec: MemorySpec, capacity: int) -> MemorySpec:
    """Of a slab with rings of `capacity` keys as a memory has them, in its layers and places, and nothing else."""
    return MemorySpec(
        name=spec.name,
        dim=spec.dim,
        capacity=capacity,
        num_layers=spec.num_layers,
        max_sequences=spec.max_sequences,
        dtype=spec.dtype,
        metric=spec.metric,
    )


@dataclass(frozen=True, slots=True)
class _Format:
    """One array of a slab."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _formats(spec: MemorySpec) -> list[_Format]:
    """The arrays in their order: keys, norms where the metric has some, payloads, codes with their terms."""
    places = (spec.num_layers, spec.max_sequences, spec.capacity)
    norms = [] if spec.metric is Metric.INNER_PRODUCT else [_Format(places, torch.float32)]
    payloads = [_Format((*places, *payload.shape), payload.dtype) for payload in spec.payloads]
    codes = _Format((*places, code_bytes(spec.first_pass, spec.dim)), torch.uint8)
    coded = [codes, _Format((*places, NUM_TERMS), torch.float32)] if BITS[spec.first_pass] else []
    return [_Format((*places, spec.dim), spec.dtype), *norms, *payloads, *coded]


def _offsets(formats: Sequence[_Format]) -> list[int]:
    """The first byte of each array in a region, and the length of them all."""
    lengths = [-(-each.size_bytes // _ALIGNED) * _ALIGNED for each in formats]
    return list(accumulate(lengths, initial=0))


def _check_host_room(spec: MemorySpec, device: torch.device) -> None:
    """Touching more than the host has would end the process, not raise."""
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cpu" and bytes_needed(spec) > host_bytes:
        raise DeviceMemoryFull(f"no room for {bytes_needed(spec)} bytes: the host has {host_bytes}")


def _touched(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        zeros = torch.empty(shape, dtype=dtype, device=device).zero_()
        torch.cuda.current_stream(device).synchronize()  # rows of a snapshot are put there by another thread
        return zeros
    size = math.prod(shape) * dtype.itemsize
    if size >= HUGE_BYTES:
        content = own_memory(size)
    else:
        content = torch.zeros(size + _LINE, dtype=torch.uint8)
        content = content[-content.data_ptr() % _LINE :][:size]
    return content.view(dtype).view(shape)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies within one device; on the host by this thread alone, unless that takes long."""
    if target.device.type == "cpu" and target.nbytes <= ALONE_BYTES:
        np.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
    else:
        target.copy_(source)


def as_cells(array: torch.Tensor) -> NDArray[np.uint8]:
    """(layers, places, capacity, ...) -> (num_cells, bytes)."""
    num_cells = array.shape[0] * array.shape[1] * array.shape[2]
    cells: NDArray[np.uint8] = array.view(num_cells, -1).view(torch.uint8).numpy()
    return cells


def _rounded(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Converts without making infinities of large finite values."""
    if keys.dtype == dtype:
        return keys
    limit = torch.finfo(dtype).max
    return keys.clamp(-limit, limit).to(dtype)


def _norms(stored: torch.Tensor, metric: Metric) -> torch.Tensor:
    if metric is Metric.L2:
        return stored.float().square().sum(-1)
    return inverse_norms(stored)


def inverse_norms(rows: torch.Tensor) -> torch.Tensor:
    """1 / |row| in float32 over the last axis; 0 for a zero row, so that its cosine with anything is 0."""
    norms = torch.linalg.vector_norm(rows.float(), dim=-1)
    return torch.where(norms > 0, 1 / norms, 0.0)
