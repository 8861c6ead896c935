"""Tiles: products of a few rows with many queries, whose sums stay in the processor's registers."""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

TILE_ROWS = 4
LANES, VECTORS = (16, 4) if binding.get_host_cpu_features().get("avx512f") else (8, 2)
PANEL = LANES * VECTORS
"""Queries of a tile: as many as there are registers for, beside TILE_ROWS times as many sums."""


@intrinsic
def multiply(_: Any, rows: Any, row: Any, panels: Any, panel: Any, tile: Any) -> Any:
    """Fills a tile, (TILE_ROWS, PANEL), with the inner products of the rows from `row` on with the queries of a panel.

    rows: (n, dim); panels: (P, dim, PANEL), the queries' elements side by side; all float32.
    """

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = signature.args
        rows_view, panels_view, tile_view = (
            context.make_array(arrays[at])(context, builder, arguments[at]) for at in (0, 2, 4)
        )
        dim = cgutils.unpack_tuple(builder, rows_view.shape)[1]
        word = dim.type
        vector = ir.VectorType(ir.FloatType(), LANES)
        first = builder.gep(rows_view.data, [builder.mul(arguments[1], dim)])
        panel_size = builder.mul(dim, ir.Constant(word, PANEL))
        queries = builder.gep(panels_view.data, [builder.mul(arguments[3], panel_size)])
        sums = [
            [cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in range(VECTORS)]
            for _ in range(TILE_ROWS)
        ]
        with cgutils.for_range(builder, dim) as loop:
            start = builder.mul(loop.index, ir.Constant(word, PANEL))
            parts = [
                _load(builder, queries, builder.add(start, ir.Constant(word, at * LANES)), vector)
                for at in range(VECTORS)
            ]
            for number, row_sums in enumerate(sums):
                place = builder.add(builder.mul(dim, ir.Constant(word, number)), loop.index)
                element = _spread(builder, builder.load(builder.gep(first, [place])), vector)
                for total, part in zip(row_sums, parts, strict=True):
                    product = builder.fmul(element, part, flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        for number, row_sums in enumerate(sums):
            for at, total in enumerate(row_sums):
                place = builder.gep(tile_view.data, [ir.Constant(word, number * PANEL + at * LANES)])
                builder.store(builder.load(total), builder.bitcast(place, vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(rows, types.intp, panels, types.intp, tile), lower


def _load(builder: Any, pointer: Any, place: Any, vector: Any) -> Any:
    """LANES floats from some place on."""
    return builder.load(builder.bitcast(builder.gep(pointer, [place]), vector.as_pointer()), align=4)


def _spread(builder: Any, value: Any, vector: Any) -> Any:
    """A vector of one float."""
    word = ir.IntType(32)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(word, 0))
    same = ir.Constant(ir.VectorType(word, LANES), None)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), same)
