"""Codes: rows in few bits an element, kept beside the rows for a first pass of a search.

A row is rotated, so that no element stands out, divided by a scale of its own, and rounded to whole numbers n of which
8, 4 or 2 bits are kept: those of (n + zero) / step. Of the `parts` codes of a byte j the lowest is that of element j,
the next one that of element bytes + j, and so on. With 8 and 4 bits the numbers are neighbours, and the largest element
gets the largest; with 2 bits they are -3, -1, 1 and 3, and the scale is the best for elements of a normal distribution,
which those of a rotated row nearly have. Two float32 terms a row make a score of the product of its numbers with a
rotated query q:

    score = terms[0] * (n . q) - terms[1]

which is that of the decoded row, but for what is the same for all rows of a query (|q|^2 of l2, |q| of cosine).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from memstore.types import FirstPass, Metric

if TYPE_CHECKING:
    from numpy.typing import NDArray

BITS = {FirstPass.ROWS: 0, FirstPass.INT8: 8, FirstPass.INT4: 4, FirstPass.INT2: 2}
NUM_TERMS = 2
NORMAL_SCALE = 0.498
"""The root mean square of elements, in which the numbers of 2 bits count, to lose least of a normal distribution."""

ELEMENTS_AT_ONCE = {"cpu": 1 << 14, "cuda": 1 << 22}
"""Of rows that are encoded at a time, by type of device, so that appending takes little memory for it. On the host no
more than torch does in one thread: on a busy machine each operation that several share takes milliseconds.
"""


def code_bytes(first_pass: FirstPass, dim: int) -> int:
    """Bytes of the code of one row."""
    return -(-dim * BITS[first_pass] // 8)


def limit(bits: int) -> int:
    """The largest whole number of a code; the smallest is its negative."""
    return 3 if bits == 2 else (1 << (bits - 1)) - 1


def zero(bits: int) -> int:
    """What is added to the whole numbers."""
    return 3 if bits == 2 else 1 << (bits - 1)


def step(bits: int) -> int:
    """The distance of neighbouring whole numbers."""
    return 2 if bits == 2 else 1


def num_parts(bits: int) -> int:
    """Elements whose codes share a byte."""
    return 8 // bits


def signs(dim: int) -> NDArray[np.float32]:
    """(dim,), 1 or -1, the same in every process: those of a row before it is rotated."""
    mixed = np.arange(dim, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return np.where(mixed >> np.uint64(63), -1, 1).astype(np.float32)


def rotated(rows: torch.Tensor) -> torch.Tensor:
    """(..., dim) float32, of the same lengths and inner products, each element a sum of many.

    A Hadamard transform of the first elements, then of the last ones: as many as a power of two allows.
    """
    dim = rows.shape[-1]
    size = 1 << (dim.bit_length() - 1)
    turned = rows * torch.from_numpy(signs(dim)).to(rows.device)
    turned[..., :size] = _transformed(turned[..., :size])
    if size < dim:
        turned[..., dim - size :] = _transformed(turned[..., dim - size :])
    return turned


def _transformed(rows: torch.Tensor) -> torch.Tensor:
    """The Hadamard transform of the last axis, a power of two, divided by the root of its size.

    On the host without any operation that waits for threads: on a busy machine each of those takes milliseconds.
    Elsewhere by two products with small matrices.
    """
    size = rows.shape[-1]
    if rows.device.type == "cpu":
        return torch.from_numpy(_butterflies(rows.reshape(-1, size).numpy())).view(rows.shape)
    left = 1 << (size.bit_length() // 2)
    left_matrix, right_matrix = (_hadamard(length, rows.device) for length in (left, size // left))
    return (left_matrix @ rows.reshape(-1, left, size // left) @ right_matrix).view(rows.shape)


def _butterflies(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """See `_transformed`; (n, size), with neighbouring rows side by side meanwhile."""
    num_rows, size = rows.shape
    turned, step = np.ascontiguousarray(rows.T), 1
    while step < size:
        pairs = turned.reshape(-1, 2, step * num_rows)
        sums = np.empty_like(pairs)
        np.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
        turned, step = sums, 2 * step
    return np.ascontiguousarray(turned.reshape(size, num_rows).T) / np.float32(math.sqrt(size))


@lru_cache(maxsize=32)
def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    """(size, size) float32 of orthogonal rows of length 1; size is a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def encode(
    rows: torch.Tensor, norms: torch.Tensor | None, metric: Metric, first_pass: FirstPass
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (layers, n, code_bytes) uint8 and terms (layers, n, NUM_TERMS) float32 of rows, (layers, n, dim).

    norms: (layers, n), as the slab has them.
    """
    num_layers, num_rows, dim = rows.shape
    codes = torch.empty(num_layers, num_rows, code_bytes(first_pass, dim), dtype=torch.uint8, device=rows.device)
    terms = torch.empty(num_layers, num_rows, NUM_TERMS, device=rows.device)
    rows_at_once = max(ELEMENTS_AT_ONCE[rows.device.type] // (num_layers * dim), 1)
    for first in range(0, num_rows, rows_at_once):
        some = slice(first, first + rows_at_once)
        mine = None if norms is None else norms[:, some]
        codes[:, some], terms[:, some] = _encode(rows[:, some], mine, metric, BITS[first_pass])
    return codes, terms


def _encode(
    rows: torch.Tensor, norms: torch.Tensor | None, metric: Metric, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    turned = rotated(rows.float())
    kept, units = _rounded(turned, bits)
    numbers = kept.float().mul_(step(bits)).sub_(zero(bits))
    if bits == 2:  # the decoded row is as near as it can be
        scales = (turned * numbers).sum(-1) / numbers.square().sum(-1)
    else:
        scales = units
    if metric is Metric.L2:
        terms = (2 * scales, scales.square() * numbers.square().sum(-1))
    else:
        terms = (scales if norms is None else scales * norms, torch.zeros_like(scales))
    return _packed(kept, bits), torch.stack(terms, -1)


def _rounded(turned: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, (..., dim) uint8, and what their numbers count in, (...,).

    Rounded by cutting off, which torch does in one thread where elements are few; its `round` it shares out.
    """
    if bits == 2:
        units = turned.square().mean(-1).sqrt_().mul_(NORMAL_SCALE)
    else:
        units = turned.abs().amax(-1) / limit(bits)
    elements = turned / torch.where(units > 0, units, 1.0)[..., None]
    lowest, highest = ((zero(bits) + sign * limit(bits)) / step(bits) for sign in (-1, 1))
    nearest = elements.add_(zero(bits)).div_(step(bits)).clamp_(lowest, highest)
    return nearest.add_(0.5).to(torch.uint8), units


def _packed(kept: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., dim) -> (..., code_bytes)."""
    parts = num_parts(bits)
    num_bytes = -(-kept.shape[-1] // parts)
    padded = torch.nn.functional.pad(kept, (0, parts * num_bytes - kept.shape[-1]))
    packed = padded[..., :num_bytes].clone()
    for part in range(1, parts):
        packed |= padded[..., part * num_bytes : (part + 1) * num_bytes] << (part * bits)
    return packed
