"""Maxima: the best score of each leaf and super, by rows or by their codes, which are read once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from memstore.codes import BITS, zero
from memstore.gpu.coded import (
    HADAMARD_DIMS,
    CodedQueries,
    coded_queries,
    signs_on,
    step_of,
    tile_of,
    width_of,
    words_and_terms,
)
from memstore.gpu.kernels.coded import number_kernel, scan_codes_kernel
from memstore.gpu.kernels.scan import scan_kernel
from memstore.gpu.launcher import can_chain, start
from memstore.gpu.rings import FANOUT
from memstore.gpu.tuning import ceil_div
from memstore.types import Metric

if TYPE_CHECKING:
    from memstore.gpu.launch import Asked
    from memstore.slab import Slab

LEAVES_OF_SUPER = FANOUT * FANOUT
METRICS = {Metric.INNER_PRODUCT: 0, Metric.L2: 1, Metric.COSINE: 2}


class Piece(NamedTuple):
    """Some blocks and the queries that they hold."""

    first_block: int
    num_blocks: int
    first_query: int
    num_queries: int


class Maxima(NamedTuple):
    """leaves, supers: (queries * num_supers * 64,) and (queries * num_supers,) float32."""

    leaves: torch.Tensor
    supers: torch.Tensor


def maxima_of(slab: Slab, asked: Asked, piece: Piece, cleared: torch.Tensor | None) -> Maxima:
    """The maxima of some queries. cleared: a bitmap that is to be 0 afterwards."""
    size = piece.num_queries * asked.num_supers
    maxima = torch.empty(size * (LEAVES_OF_SUPER + 1), device=slab.device)
    leaves, supers = maxima.tensor_split((size * LEAVES_OF_SUPER,))
    if asked.is_coded:
        _scan_codes(slab, asked, piece, Maxima(leaves, supers), cleared)
        return Maxima(leaves, supers)
    shape = asked.shape
    start(
        scan_kernel,
        (piece.num_blocks * ceil_div(asked.num_supers, shape.supers),),
        asked.queries,
        slab.keys,
        leaves if slab.norms is None else slab.norms,
        asked.tables.blocks,
        leaves,
        supers,
        asked.tables.query_rings if cleared is None else cleared,
        piece.first_block,
        piece.num_blocks,
        asked.num_supers,
        slab.capacity,
        slab.num_cells,
        piece.first_query,
        DIM=slab.dim,
        METRIC=METRICS[slab.metric],
        PARTS=shape.parts,
        BLOCK_Q=shape.queries,
        BLOCK_N=shape.slots,
        BLOCK_D=shape.dims,
        STAGES=shape.stages,
        SUPERS=shape.supers,
        IS_CLEARING=cleared is not None,
        num_warps=shape.warps,
        is_chained=can_chain(slab.device),
    )
    return Maxima(leaves, supers)


def _scan_codes(slab: Slab, asked: Asked, piece: Piece, maxima: Maxima, cleared: torch.Tensor | None) -> None:
    """Fills the maxima by codes; see `maxima_of`."""
    codes, terms = words_and_terms(slab)
    words = codes.shape[-1]
    tiles_at_once, words_at_once = tile_of(words)
    start(
        scan_codes_kernel,
        (piece.num_blocks * asked.num_supers,),
        *_numbered(slab, asked.queries),
        codes,
        terms,
        asked.tables.blocks,
        *maxima,
        asked.tables.query_rings if cleared is None else cleared,
        piece.first_block,
        piece.num_blocks,
        asked.num_supers,
        slab.capacity,
        slab.num_cells,
        piece.first_query,
        WORDS=words,
        BITS=BITS[slab.first_pass],
        STEP=step_of(slab),
        TILES=tiles_at_once,
        BLOCK_W=words_at_once,
        IS_CLEARING=cleared is not None,
        HAS_DOT=slab.device.type == "cuda",
        num_warps=4,
        is_chained=can_chain(slab.device),
    )


def _numbered(slab: Slab, queries: torch.Tensor) -> CodedQueries:
    if slab.dim not in HADAMARD_DIMS:
        return coded_queries(slab, queries)
    width, bits_of_left = width_of(slab), slab.dim.bit_length() // 2
    numbers = torch.empty((len(queries), width), dtype=torch.int8, device=slab.device)
    scales = torch.empty((len(queries), 2), device=slab.device)
    start(
        number_kernel,
        (len(queries),),
        queries,
        signs_on(slab.dim, slab.device),
        numbers,
        scales,
        ZERO=zero(BITS[slab.first_pass]),
        WIDTH=width,
        LEFT=1 << bits_of_left,
        RIGHT=slab.dim >> bits_of_left,
        FACTOR=slab.dim**-0.5,
        num_warps=8 if slab.dim <= 512 else 16,
        is_chained=can_chain(slab.device),
    )
    return CodedQueries(numbers.view(torch.int32), scales)
