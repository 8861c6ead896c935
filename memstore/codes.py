"""Codes: rows in few bits an element, kept beside the rows for a first pass of a search.

A row is rotated, so that no element stands out, divided by a scale of its own, and rounded to whole numbers of 8 or 4
bits, which are kept as bytes after `ZERO` is added. With 4 bits element j lies in the low half of byte j, and element
bytes + j in the high half. Two float32 terms a row make a score of the product of its numbers n with a rotated query q:

    score = terms[0] * (n . q) - terms[1]

which is that of the decoded row, but for what is the same for all rows of a query (|q|^2 of l2, |q| of cosine).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from memstore.types import FirstPass, Metric

if TYPE_CHECKING:
    from numpy.typing import NDArray

BITS = {FirstPass.ROWS: 0, FirstPass.INT8: 8, FirstPass.INT4: 4}
NUM_TERMS = 2
ROWS_AT_ONCE = 1024
"""Rows that are encoded at a time, so that appending takes little memory for it."""


def code_bytes(first_pass: FirstPass, dim: int) -> int:
    """Bytes of the code of one row."""
    return -(-dim * BITS[first_pass] // 8)


def limit(bits: int) -> int:
    """The largest whole number of a code; the smallest is its negative."""
    return (1 << (bits - 1)) - 1


def zero(bits: int) -> int:
    """What is added to the whole numbers."""
    return 1 << (bits - 1)


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
    """The Hadamard transform of the last axis, a power of two, divided by the root of its size."""
    shape, size = rows.shape, rows.shape[-1]
    step = 1
    while step < size:
        pairs = rows.reshape(*shape[:-1], size // (2 * step), 2, step)
        rows = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2)
        step *= 2
    return rows.reshape(shape) / math.sqrt(size)


def encode(
    rows: torch.Tensor, norms: torch.Tensor | None, metric: Metric, first_pass: FirstPass
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (layers, n, code_bytes) uint8 and terms (layers, n, NUM_TERMS) float32 of rows, (layers, n, dim).

    norms: (layers, n), as the slab has them.
    """
    num_layers, num_rows, dim = rows.shape
    codes = torch.empty(num_layers, num_rows, code_bytes(first_pass, dim), dtype=torch.uint8, device=rows.device)
    terms = torch.empty(num_layers, num_rows, NUM_TERMS, device=rows.device)
    for first in range(0, num_rows, ROWS_AT_ONCE):
        some = slice(first, first + ROWS_AT_ONCE)
        mine = None if norms is None else norms[:, some]
        codes[:, some], terms[:, some] = _encode(rows[:, some], mine, metric, BITS[first_pass])
    return codes, terms


def _encode(
    rows: torch.Tensor, norms: torch.Tensor | None, metric: Metric, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    turned = rotated(rows.float())
    scales = turned.abs().amax(-1, keepdim=True) / limit(bits)
    numbers = (turned / torch.where(scales > 0, scales, 1.0)).round_().clamp_(-limit(bits), limit(bits))
    scales = scales[..., 0]
    if metric is Metric.L2:
        terms = (2 * scales, scales.square() * numbers.square().sum(-1))
    else:
        terms = (scales if norms is None else scales * norms, torch.zeros_like(scales))
    return _packed(numbers.add_(zero(bits)).to(torch.uint8), bits), torch.stack(terms, -1)


def _packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., dim) -> (..., code_bytes)."""
    if bits == 8:
        return numbers
    num_bytes = -(-numbers.shape[-1] // 2)
    high = numbers[..., num_bytes:]
    if high.shape[-1] < num_bytes:  # the half byte beyond an odd dim
        high = torch.nn.functional.pad(high, (0, 1), value=zero(bits))
    return numbers[..., :num_bytes] | (high << 4)
