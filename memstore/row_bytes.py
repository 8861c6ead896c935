"""RowFormat: rows as a slab stores them, as bytes and back. What a log and a snapshot hold of an entry.

The arrays stand one behind the other, row-major and little-endian: keys (layers, n, dim), norms (layers, n) float32
unless the metric is `ip`, then each payload (layers, n, *shape) in the order of the spec.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from memstore.slab import StagedRows
from memstore.types import KEY, MemorySpec, Metric

NORM = "norm"


@dataclass(frozen=True, slots=True)
class ArrayFormat:
    """One array of an entry: its name, and its elements an entry and layer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry in one layer."""
        return math.prod(self.shape) * self.dtype.itemsize


class RowFormat:
    """What bytes the rows of a spec are."""

    def __init__(self, spec: MemorySpec) -> None:
        norms = [] if spec.metric is Metric.INNER_PRODUCT else [ArrayFormat(NORM, torch.float32, ())]
        payloads = [ArrayFormat(payload.name, payload.dtype, payload.shape) for payload in spec.payloads]
        self.arrays = (ArrayFormat(KEY, spec.dtype, (spec.dim,)), *norms, *payloads)
        self.num_layers = spec.num_layers
        self.row_bytes = spec.num_layers * sum(array.row_bytes for array in self.arrays)

    def encode(self, rows: StagedRows) -> list[memoryview]:
        """The bytes of rows, array by array; on the host they are the rows' own."""
        norms = [] if rows.norms is None else [rows.norms]
        return [_bytes_of(array) for array in (rows.keys, *norms, *rows.payloads.values())]

    def decode(self, content: memoryview, num_rows: int) -> StagedRows:
        """The rows of `num_rows` * row_bytes bytes, which they share."""
        arrays: dict[str, torch.Tensor] = {}
        offset = 0
        for array in self.arrays:
            end = offset + self.num_layers * num_rows * array.row_bytes
            flat = torch.frombuffer(content[offset:end], dtype=torch.uint8).view(array.dtype)
            arrays[array.name] = flat.view(self.num_layers, num_rows, *array.shape)
            offset = end
        keys, norms = arrays.pop(KEY), arrays.pop(NORM, None)
        return StagedRows(keys, norms, arrays)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data
