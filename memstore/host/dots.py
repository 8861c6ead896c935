"""Dots: whole-number products of codes with a query, 32 bytes at a time."""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

CHUNK = 32
_LANES = CHUNK // 4
_BYTES, _SHORTS, _WORDS = (
    ir.VectorType(ir.IntType(bits), lanes) for bits, lanes in ((8, CHUNK), (16, CHUNK), (32, _LANES))
)
_FEATURES = binding.get_host_cpu_features()
_HAS_DOT = bool(_FEATURES.get("avx512vnni") and _FEATURES.get("avx512vl"))
"""Whether the processor multiplies and adds four bytes at once."""


def _dot(is_halved: bool, num_rows: int) -> Any:
    """An intrinsic for codes of 4 bits, or 8, and so many rows at once, for which the query is loaded once."""

    @intrinsic
    def dot(_: Any, codes: Any, row: Any, numbers: Any, query: Any, products: Any) -> Any:
        """Writes the inner products of rows of codes from `row` on with a query's numbers, over all whole chunks.

        codes: (n, bytes) uint8; numbers: (m, bytes) int8, of 4 bits (m, 2 * bytes), those of the low halves first.
        products: (n,) int32, of which those of the rows are written.
        """

        def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            views = [context.make_array(signature.args[at])(context, builder, arguments[at]) for at in (0, 2, 4)]
            _write_products(builder, views, arguments[1], arguments[3], is_halved, num_rows)
            return context.get_dummy_value()

        return types.void(codes, types.intp, numbers, types.intp, products), lower

    return dot


ROWS = 4
"""Rows at once: enough that loading the query and ending a row do not count."""

dot_bytes, dot_bytes_of_one, dot_halves, dot_halves_of_one = (
    _dot(is_halved, num_rows) for is_halved in (False, True) for num_rows in (ROWS, 1)
)


def _write_products(builder: Any, views: Any, row: Any, query: Any, is_halved: bool, num_rows: int) -> None:
    codes, numbers, products = views
    num_bytes = cgutils.unpack_tuple(builder, codes.shape)[1]
    word = num_bytes.type
    width = builder.mul(num_bytes, ir.Constant(word, 2 if is_halved else 1))
    asked = builder.gep(numbers.data, [builder.mul(query, width)])
    firsts = [
        builder.gep(codes.data, [builder.mul(builder.add(row, ir.Constant(word, at)), num_bytes)])
        for at in range(num_rows)
    ]
    totals = [cgutils.alloca_once_value(builder, ir.Constant(_WORDS, None)) for _ in firsts]
    with cgutils.for_range(builder, builder.udiv(num_bytes, ir.Constant(word, CHUNK))) as loop:
        place = builder.mul(loop.index, ir.Constant(word, CHUNK))
        low = _chunk(builder, asked, place)
        high = _chunk(builder, asked, builder.add(place, num_bytes)) if is_halved else None
        for first, total in zip(firsts, totals, strict=True):
            code, summed = _chunk(builder, first, place), builder.load(total)
            if is_halved:
                summed = _add(builder, summed, builder.lshr(code, _all(4)), high)
                code = builder.and_(code, _all(15))
            builder.store(_add(builder, summed, code, low), total)
    kind = ir.FunctionType(ir.IntType(32), [_WORDS])
    reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.add.v{_LANES}i32")
    for at, total in enumerate(totals):
        into = builder.gep(products.data, [builder.add(row, ir.Constant(word, at))])
        builder.store(builder.call(reduce, [builder.load(total)]), into)


def _add(builder: Any, total: Any, codes: Any, numbers: Any) -> Any:
    """Adds products of unsigned with signed bytes to a vector of words, in whatever lane."""
    if _HAS_DOT:
        kind = ir.FunctionType(_WORDS, [_WORDS] * 3)
        dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.256")
        return builder.call(dot, [total, builder.bitcast(codes, _WORDS), builder.bitcast(numbers, _WORDS)])
    products = builder.mul(builder.zext(codes, _SHORTS), builder.sext(numbers, _SHORTS))
    wide = builder.sext(products, ir.VectorType(ir.IntType(32), CHUNK))
    for first in range(0, CHUNK, _LANES):
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), list(range(first, first + _LANES)))
        total = builder.add(total, builder.shuffle_vector(wide, ir.Constant(wide.type, ir.Undefined), lanes))
    return total


def _chunk(builder: Any, pointer: Any, place: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(pointer, [place]), _BYTES.as_pointer()), align=1)


def _all(value: int) -> Any:
    return ir.Constant(_BYTES, [value] * CHUNK)
