"""How the scan goes about a batch, by what was fastest on an H200. Without an influence on what is found."""

from __future__ import annotations

from typing import NamedTuple

import torch

NUM_PARTS = {
    (torch.float32, torch.float16): 2,
    (torch.bfloat16, torch.float16): 1,
    (torch.float32, torch.bfloat16): 3,
    (torch.float16, torch.bfloat16): 2,
}
"""16-bit parts of queries of the first dtype that are as precise together as they are, beside rows of the second."""

MOST_HITS = 128
"""The largest top_k that the kernels have room for."""

WIDEST_DIM = 256
"""Up to so many dimensions a block of queries stays in shared memory."""


class ScanShape(NamedTuple):
    """Queries, slots and dimensions that a program works on at a time; supers that it goes through.

    parts: 0 where queries are multiplied as they are.
    """

    queries: int
    slots: int
    dims: int
    stages: int
    supers: int
    warps: int
    parts: int


def scan_shape(dim: int, row_dtype: torch.dtype, query_dtype: torch.dtype, most_queries: int) -> ScanShape:
    """The shape for a batch none of whose rings has more than `most_queries`."""
    parts = NUM_PARTS.get((query_dtype, row_dtype), 0)
    dims = max(1 << (dim - 1).bit_length(), 16) if dim <= WIDEST_DIM else 64
    if row_dtype == torch.float32:
        return ScanShape(16 if most_queries <= 16 else 64, 64, min(dims, 64), 2, 1, 4, parts)
    if most_queries <= 16:
        return ScanShape(16, 64, dims, 2, 1, 4, parts)
    if most_queries <= 64 or parts:
        return ScanShape(64, 64, dims, 2, 4, 4, parts)
    if dim > WIDEST_DIM:
        return ScanShape(128, 64, dims, 3, 4, 4, parts)
    if most_queries <= 128:
        return ScanShape(128, 128, dims, 2, 4, 8, parts)
    return ScanShape(256, 64, dims, 2, 8, 8, parts)


def power_of_two(number: int) -> int:
    """The least one that is not below a number."""
    return 1 << max(number - 1, 0).bit_length()


def ceil_div(number: int, of: int) -> int:
    """How many pieces of a size hold a number."""
    return -(-number // of)
