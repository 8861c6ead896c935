"""A first pass over codes on a GPU: which batches have one, and the numbers of their queries."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from memstore.codes import BITS, code_bytes, num_parts, rotated, signs, step, zero
from memstore.gpu.tuning import MOST_HITS

if TYPE_CHECKING:
    from memstore.slab import Slab

MOST_QUERIES = 8
"""Of one ring: for more, a product of tensor cores is quicker than as many of whole numbers."""

LEAVES_A_HIT = {8: 2, 4: 4, 2: 8}
"""Leaves that are scored by their rows, for each hit asked for."""

FEWEST_HITS = 8
"""As many leaves as for so many hits there are at least."""

WORD_BYTES = 4
LARGEST = 127
"""The largest number of a query."""

WIDEST_MATRIX = 1024
"""Up to so many dimensions queries are rotated by one product with a matrix, which is kept."""

HADAMARD_DIMS = (128, 256, 512, 1024)
"""Dimensions whose queries one kernel rotates and rounds."""

TILE_WORDS = 4096
"""Words of codes that a program works on at a time."""


class CodedQueries(NamedTuple):
    """numbers: (Q, parts * words) int32, each of four int8; scales: (Q, 2) float32, see kernels/coded.py."""

    numbers: torch.Tensor
    scales: torch.Tensor


def reads_codes(slab: Slab, top_k: int, most_queries: int) -> bool:
    """Whether codes are read for a batch none of whose rings has more than `most_queries`."""
    return (
        slab.codes is not None
        and most_queries <= MOST_QUERIES
        and code_bytes(slab.first_pass, slab.dim) % WORD_BYTES == 0
        and num_leaves(slab, top_k) <= MOST_HITS
    )


def num_leaves(slab: Slab, top_k: int) -> int:
    """Leaves that are scored by their rows for each query."""
    return LEAVES_A_HIT[BITS[slab.first_pass]] * max(top_k, FEWEST_HITS)


def tile_of(num_words: int) -> tuple[int, int]:
    """Tiles of 64 rows and words of a row that a program works on at a time."""
    words = min(1 << (num_words - 1).bit_length(), 64)
    return max(min(TILE_WORDS // (64 * words), 8), 1), words


def coded_queries(slab: Slab, queries: torch.Tensor) -> CodedQueries:
    """The numbers of (Q, dim) queries, where number_kernel does not make them."""
    bits = BITS[slab.first_pass]
    if slab.dim <= WIDEST_MATRIX:
        turned = queries.float() @ _rotation(slab.dim, slab.device)
    else:
        turned = rotated(queries.float())
    scales = turned.abs().amax(-1, keepdim=True) / LARGEST
    numbers = (turned / torch.where(scales > 0, scales, 1.0)).round_().clamp_(-LARGEST, LARGEST)
    shifts = numbers.sum(-1, keepdim=True) * zero(bits)
    padded = torch.nn.functional.pad(numbers, (0, width_of(slab) - slab.dim)).to(torch.int8)
    return CodedQueries(padded.view(torch.int32), torch.cat((scales, shifts), -1))


def words_and_terms(slab: Slab) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a slab that has codes: those, (layers, places, capacity, words) int32, and their terms."""
    if slab.codes is None or slab.terms is None:
        raise ValueError("no codes are kept here")
    return slab.codes.view(torch.int32), slab.terms


def width_of(slab: Slab) -> int:
    """Numbers of a query, zeros behind the last included."""
    return code_bytes(slab.first_pass, slab.dim) * num_parts(BITS[slab.first_pass])


def step_of(slab: Slab) -> int:
    """See codes.step."""
    return step(BITS[slab.first_pass])


@lru_cache(maxsize=8)
def signs_on(dim: int, device: torch.device) -> torch.Tensor:
    """codes.signs there."""
    return torch.from_numpy(signs(dim)).to(device)


@lru_cache(maxsize=8)
def _rotation(dim: int, device: torch.device) -> torch.Tensor:
    """(dim, dim) float32: what is multiplied with it is rotated."""
    return rotated(torch.eye(dim)).to(device)
