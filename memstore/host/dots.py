"""Dots: whole-number products of codes with a query, 32 bytes at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from memstore.host.lowering import sums_of_four

CHUNK = 32
_LANES = CHUNK // 4
_BYTES, _SHORTS, _WORDS = (
    ir.VectorType(ir.IntType(bits), lanes) for bits, lanes in ((8, CHUNK), (16, CHUNK), (32, _LANES))
)
_PAIRS = ir.VectorType(ir.IntType(16), CHUNK // 2)
_FEATURES = binding.get_host_cpu_features()
HAS_DOT = bool(_FEATURES.get("avx512vnni") and _FEATURES.get("avx512vl"))
"""Whether the processor multiplies and adds four bytes at once."""

HAS_PAIRS = bool(_FEATURES.get("avx2"))
"""Whether it does so with two, whose sum must have room in 16 bits: that of codes of 4 bits has."""


class Way(NamedTuple):
    """How rows are multiplied. bits: of a code; num_rows: at once, for which the query is loaded once."""

    bits: int
    num_rows: int
    has_dot: bool = HAS_DOT
    has_pairs: bool = HAS_PAIRS


def make_dot(way: Way) -> Any:
    """An intrinsic for rows of codes."""

    @intrinsic
    def dot(_: Any, codes: Any, row: Any, numbers: Any, query: Any, products: Any) -> Any:
        """Writes the inner products of rows of codes from `row` on with a query's numbers, over all whole chunks.

        codes: (n, bytes) uint8; numbers: (m, parts * bytes) int8, those of the lowest bits of each byte first.
        products: (n,) int32, of which those of the rows are written.
        """

        def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            views = [context.make_array(signature.args[at])(context, builder, arguments[at]) for at in (0, 2, 4)]
            _write_products(builder, views, arguments[1], arguments[3], way)
            return context.get_dummy_value()

        return types.void(codes, types.intp, numbers, types.intp, products), lower

    return dot


ROWS = 4
"""Rows at once: enough that loading the query and ending a row do not count."""

dot_bytes, dot_bytes_of_one, dot_halves, dot_halves_of_one, dot_quarters, dot_quarters_of_one = (
    make_dot(Way(bits, num_rows)) for bits in (8, 4, 2) for num_rows in (ROWS, 1)
)


def _write_products(builder: Any, views: Any, row: Any, query: Any, way: Way) -> None:
    codes, numbers, products = views
    num_bytes = cgutils.unpack_tuple(builder, codes.shape)[1]
    word, parts = num_bytes.type, 8 // way.bits
    width = builder.mul(num_bytes, ir.Constant(word, parts))
    asked = builder.gep(numbers.data, [builder.mul(query, width)])
    firsts = [
        builder.gep(codes.data, [builder.mul(builder.add(row, ir.Constant(word, at)), num_bytes)])
        for at in range(way.num_rows)
    ]
    totals = [cgutils.alloca_once_value(builder, ir.Constant(_WORDS, None)) for _ in firsts]
    with cgutils.for_range(builder, builder.udiv(num_bytes, ir.Constant(word, CHUNK))) as loop:
        place = builder.mul(loop.index, ir.Constant(word, CHUNK))
        some = [
            _chunk(builder, asked, builder.add(place, builder.mul(num_bytes, ir.Constant(word, part))))
            for part in range(parts)
        ]
        for first, total in zip(firsts, totals, strict=True):
            code, summed = _chunk(builder, first, place), builder.load(total)
            for part, few in enumerate(some):
                summed = _add(builder, summed, _part(builder, code, part, way.bits), few, way)
            builder.store(summed, total)
    sums = [builder.load(total) for total in totals]
    into = builder.gep(products.data, [row])
    if way.num_rows == ROWS:
        summed = sums_of_four(builder, sums, builder.add)
        builder.store(summed, builder.bitcast(into, summed.type.as_pointer()), align=4)
    else:
        kind = ir.FunctionType(ir.IntType(32), [_WORDS])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.add.v{_LANES}i32")
        builder.store(builder.call(reduce, sums), into)


def _part(builder: Any, code: Any, part: int, bits: int) -> Any:
    """The codes of one element a byte; bytes are shifted 16 bits at a time, as processors do."""
    if bits == 8:
        return code
    if part:
        amount = ir.Constant(_PAIRS, [part * bits] * (CHUNK // 2))
        code = builder.bitcast(builder.lshr(builder.bitcast(code, _PAIRS), amount), _BYTES)
    return builder.and_(code, ir.Constant(_BYTES, [(1 << bits) - 1] * CHUNK))


def _add(builder: Any, total: Any, codes: Any, numbers: Any, way: Way) -> Any:
    """Adds products of unsigned with signed bytes to a vector of words, in whatever lane."""
    if way.has_dot:
        kind = ir.FunctionType(_WORDS, [_WORDS] * 3)
        dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.256")
        return builder.call(dot, [total, builder.bitcast(codes, _WORDS), builder.bitcast(numbers, _WORDS)])
    if way.has_pairs and way.bits <= 4:
        kind = ir.FunctionType(_PAIRS, [_BYTES] * 2)
        multiply = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.ub.sw")
        kind = ir.FunctionType(_WORDS, [_PAIRS] * 2)
        add = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
        ones = ir.Constant(_PAIRS, [1] * (CHUNK // 2))
        return builder.add(total, builder.call(add, [builder.call(multiply, [codes, numbers]), ones]))
    products = builder.mul(builder.zext(codes, _SHORTS), builder.sext(numbers, _SHORTS))
    wide = builder.sext(products, ir.VectorType(ir.IntType(32), CHUNK))
    for first in range(0, CHUNK, _LANES):
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), list(range(first, first + _LANES)))
        total = builder.add(total, builder.shuffle_vector(wide, ir.Constant(wide.type, ir.Undefined), lanes))
    return total


def _chunk(builder: Any, pointer: Any, place: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(pointer, [place]), _BYTES.as_pointer()), align=1)
