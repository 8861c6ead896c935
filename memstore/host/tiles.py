"""Tiles: products of a few rows with many queries, whose sums stay in the processor's registers."""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

TILE_ROWS = 4
LANES, VECTORS = (16, 4) if binding.get_host_cpu_features().get("avx512f") else (8, 3)
PANEL = LANES * VECTORS
"""Queries of a tile: as many as there are registers for, beside TILE_ROWS times as many sums."""

_WORD = ir.IntType(32)
_BITS = ir.VectorType(ir.IntType(1), LANES)
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


@intrinsic
def multiply(_: Any, rows: Any, row: Any, weights: Any, panels: Any, panel: Any, bars: Any, tile: Any) -> Any:
    """Fills a tile, (TILE_ROWS, PANEL), with what the rows from `row` on are ranked by for the queries of a panel.

    That is, of a row of weights, (n, 2): the first times the inner product, less the second. rows: (n, dim); panels:
    (P, dim, PANEL), the queries' elements side by side; bars: (m,), of those queries of the panel that there are, with
    memory for a whole panel behind the first; all float32. Gives an int32 of one bit a row of the tile: whether it
    reaches any bar, or cannot be compared.
    """

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = signature.args
        views = [context.make_array(arrays[at])(context, builder, arguments[at]) for at in (0, 2, 3, 5, 6)]
        rows_view, weights_view, panels_view, bars_view, tile_view = views
        dim = cgutils.unpack_tuple(builder, rows_view.shape)[1]
        word = dim.type
        panel_size = builder.mul(dim, ir.Constant(word, PANEL))
        queries = builder.gep(panels_view.data, [builder.mul(arguments[4], panel_size)])
        first = builder.gep(rows_view.data, [builder.mul(arguments[1], dim)])
        sums = _products(builder, first, queries, dim)
        weight = builder.gep(weights_view.data, [builder.mul(arguments[1], ir.Constant(word, 2))])
        width = builder.trunc(cgutils.unpack_tuple(builder, bars_view.shape)[0], _WORD)
        places = [ir.Constant(word, at * LANES) for at in range(VECTORS)]
        bar_vectors = [_load(builder, bars_view.data, place) for place in places]
        are_there = [_are_below(builder, at * LANES, width) for at in range(VECTORS)]
        mask: Any = ir.Constant(_WORD, 0)
        for number, row_sums in enumerate(sums):
            factor, less = (
                _spread(builder, builder.load(builder.gep(weight, [ir.Constant(word, 2 * number + at)])))
                for at in range(2)
            )
            reached: Any = ir.Constant(_BITS, None)
            for at, total in enumerate(row_sums):
                value = builder.fsub(builder.fmul(factor, builder.load(total)), less, flags=("contract",))
                place = builder.gep(tile_view.data, [ir.Constant(word, number * PANEL + at * LANES)])
                builder.store(value, builder.bitcast(place, _VECTOR.as_pointer()), align=4)
                not_below = builder.fcmp_unordered(">=", value, bar_vectors[at])
                reached = builder.or_(reached, builder.and_(not_below, are_there[at]))
            bits = ir.IntType(LANES)
            is_any = builder.icmp_unsigned("!=", builder.bitcast(reached, bits), ir.Constant(bits, 0))
            mask = builder.or_(mask, builder.shl(builder.zext(is_any, _WORD), ir.Constant(_WORD, number)))
        return mask

    return types.int32(rows, types.intp, weights, panels, types.intp, bars, tile), lower


def _products(builder: Any, first: Any, queries: Any, dim: Any) -> list[list[Any]]:
    """Where the inner products of TILE_ROWS rows with a panel are: VECTORS vectors a row."""
    word = dim.type
    sums = [
        [cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, None)) for _ in range(VECTORS)]
        for _ in range(TILE_ROWS)
    ]
    with cgutils.for_range(builder, dim) as loop:
        start = builder.mul(loop.index, ir.Constant(word, PANEL))
        parts = [_load(builder, queries, builder.add(start, ir.Constant(word, at * LANES))) for at in range(VECTORS)]
        for number, row_sums in enumerate(sums):
            place = builder.add(builder.mul(dim, ir.Constant(word, number)), loop.index)
            element = _spread(builder, builder.load(builder.gep(first, [place])))
            for total, part in zip(row_sums, parts, strict=True):
                product = builder.fmul(element, part, flags=("contract",))
                builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
    return sums


def _are_below(builder: Any, first: int, width: Any) -> Any:
    """Which of the numbers from `first` on, one a lane, are below `width`."""
    numbers = ir.Constant(ir.VectorType(_WORD, LANES), list(range(first, first + LANES)))
    return builder.icmp_unsigned("<", numbers, _spread(builder, width))


def _load(builder: Any, pointer: Any, place: Any) -> Any:
    """LANES floats from some place on."""
    return builder.load(builder.bitcast(builder.gep(pointer, [place]), _VECTOR.as_pointer()), align=4)


def _spread(builder: Any, value: Any) -> Any:
    """A vector of one number."""
    vector = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_WORD, 0))
    same = ir.Constant(ir.VectorType(_WORD, LANES), None)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), same)
