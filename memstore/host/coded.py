"""A first pass over codes: rows are read in few bits an element, see memstore/codes.py, and the best by their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from memstore.host.compiling import kernel
from memstore.host.dots import (
    CHUNK,
    ROWS,
    dot_bytes,
    dot_bytes_of_one,
    dot_halves,
    dot_halves_of_one,
    dot_quarters,
    dot_quarters_of_one,
)
from memstore.host.scoring import ask_ahead

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST = np.float32(127)
"""The largest number of a query: it has 8 bits whatever the codes have."""


class Coded(NamedTuple):
    """bits: of an element, 0 where there are no codes. codes, terms: of all cells, see codes.py.

    numbers: (Q, width) int8 of the rotated queries; scales: (Q,) float32, what they are to be multiplied with; shifts:
    (Q,) int64, what the zero of the codes adds to each of their products, once those are multiplied with their step.
    """

    bits: int
    codes: NDArray[np.uint8]
    terms: NDArray[np.float32]
    numbers: NDArray[np.int8]
    scales: NDArray[np.float32]
    shifts: NDArray[np.int64]


@kernel
def code_query(coded: Coded, query: int, vector: NDArray[Any]) -> None:
    """Fills in a query's numbers. vector: (dim,) float32."""
    turned, numbers = vector.copy(), coded.numbers[query]
    rotate(turned)
    largest = np.float32(0)
    for at in range(len(turned)):
        largest = max(largest, abs(turned[at]))
    scale = largest / LARGEST
    total = 0
    numbers[len(turned) :] = 0
    for at in range(len(turned)):
        number = np.rint(turned[at] / scale) if scale > 0 else np.float32(0)
        numbers[at] = np.int8(max(min(number, LARGEST), -LARGEST))
        total += numbers[at]
    coded.scales[query] = scale
    coded.shifts[query] = total * (3 if coded.bits == 2 else 1 << (coded.bits - 1))


@kernel
def score_codes(coded: Coded, cell: int, query: int, products: NDArray[Any], scores: NDArray[Any]) -> None:
    """What the rows from `cell` on are ranked by in the first pass, (n,) float32, never NaN. products: (n,) int32."""
    codes, terms = coded.codes[cell : cell + len(scores)], coded.terms[cell : cell + len(scores)]
    if coded.bits == 2:
        _multiply_quarters(codes, coded.numbers, query, products)
    elif coded.bits == 4:
        _multiply_halves(codes, coded.numbers, query, products)
    else:
        _multiply_bytes(codes, coded.numbers, query, products)
    scale, shift = coded.scales[query], np.int32(coded.shifts[query])
    step = np.int32(2 if coded.bits == 2 else 1)
    for row in range(len(scores)):
        value = terms[row, 0] * (scale * np.float32(step * products[row] - shift)) - terms[row, 1]
        scores[row] = value if value == value else np.float32(-np.inf)


@kernel
def _multiply_quarters(codes: NDArray[Any], numbers: NDArray[Any], query: int, products: NDArray[Any]) -> None:
    whole = len(codes) // ROWS * ROWS
    for row in range(0, whole, ROWS):
        ask_ahead(codes, row, ROWS)
        dot_quarters(codes, row, numbers, query, products)
    for row in range(whole, len(codes)):
        dot_quarters_of_one(codes, row, numbers, query, products)
    _add_rest(codes, numbers, query, 2, products)


@kernel
def _multiply_halves(codes: NDArray[Any], numbers: NDArray[Any], query: int, products: NDArray[Any]) -> None:
    whole = len(codes) // ROWS * ROWS
    for row in range(0, whole, ROWS):
        ask_ahead(codes, row, ROWS)
        dot_halves(codes, row, numbers, query, products)
    for row in range(whole, len(codes)):
        dot_halves_of_one(codes, row, numbers, query, products)
    _add_rest(codes, numbers, query, 4, products)


@kernel
def _multiply_bytes(codes: NDArray[Any], numbers: NDArray[Any], query: int, products: NDArray[Any]) -> None:
    whole = len(codes) // ROWS * ROWS
    for row in range(0, whole, ROWS):
        ask_ahead(codes, row, ROWS)
        dot_bytes(codes, row, numbers, query, products)
    for row in range(whole, len(codes)):
        dot_bytes_of_one(codes, row, numbers, query, products)
    _add_rest(codes, numbers, query, 8, products)


@kernel
def _add_rest(codes: NDArray[Any], numbers: NDArray[Any], query: int, bits: int, products: NDArray[Any]) -> None:
    """Adds what is beyond the last whole chunk."""
    num_bytes, mask = codes.shape[1], np.int32((1 << bits) - 1)
    for at in range(num_bytes // CHUNK * CHUNK, num_bytes):
        for part in range(8 // bits):
            number = np.int32(numbers[query, part * num_bytes + at])
            for row in range(len(codes)):
                products[row] += ((np.int32(codes[row, at]) >> np.int32(part * bits)) & mask) * number


@kernel
def rotate(vector: NDArray[Any]) -> None:
    """What `codes.rotated` does, in place."""
    dim, size = len(vector), 1
    while 2 * size <= dim:
        size *= 2
    for at in range(dim):
        vector[at] *= _sign(at)
    _transform(vector[:size])
    if size < dim:
        _transform(vector[dim - size :])


@kernel
def _transform(vector: NDArray[Any]) -> None:
    size, step = len(vector), 1
    while step < size:
        for first in range(0, size, 2 * step):
            for at in range(first, first + step):
                one, other = vector[at], vector[at + step]
                vector[at], vector[at + step] = one + other, one - other
        step *= 2
    vector *= np.float32(1) / np.sqrt(np.float32(size))


@kernel
def _sign(at: int) -> Any:
    """See codes.signs."""
    mixed = np.uint64(at) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return np.float32(-1) if mixed >> np.uint64(63) else np.float32(1)
