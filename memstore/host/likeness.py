"""Likeness: of rows as they are stored to a query, a vector at a time.

A row's sum is taken in the same order alone and among others, so equal rows are equally like a query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from memstore.host.lowering import AHEAD_BYTES, LINE_BYTES, prefetch_line, sums_of_four, wide
from memstore.host.tiles import LANES

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = 4
"""Rows at once, read one after the other, as memory gives them fastest, and ended together."""

CHAINS = 4
"""Sums of a row that are taken side by side, as one addition takes as long as beginning so many."""

_SINGLE = ir.FloatType()
_VECTOR = ir.VectorType(_SINGLE, LANES)


def _likeness(add: Callable[..., Any], num_rows: int) -> Any:
    @intrinsic
    def likeness(_: Any, keys: Any, row: Any, query: Any, scores: Any) -> Any:
        """Writes the likeness of rows from `row` on to a query, (dim,) float32, into scores, (n,) float32.

        keys: (n, dim), see `widened`.
        """

        def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            stored, asked, into = (
                context.make_array(signature.args[at])(context, builder, arguments[at]) for at in (0, 2, 3)
            )
            dim = cgutils.unpack_tuple(builder, stored.shape)[1]
            numbers = [builder.add(arguments[1], ir.Constant(dim.type, at)) for at in range(num_rows)]
            rows = [builder.gep(stored.data, [builder.mul(number, dim)]) for number in numbers]
            totals = _Sums(builder, signature.args[0].dtype, rows, asked.data, add).over(dim)
            for number, total in zip(numbers, totals, strict=True):
                builder.store(total, builder.gep(into.data, [number]))
            return context.get_dummy_value()

        return types.void(keys, types.intp, query, scores), lower

    return likeness


def _apart(builder: Any, total: Any, stored: Any, asked: Any) -> Any:
    apart = builder.fsub(stored, asked)
    return builder.fsub(total, builder.fmul(apart, apart, flags=("contract",)), flags=("contract",))


def _product(builder: Any, total: Any, stored: Any, asked: Any) -> Any:
    return builder.fadd(total, builder.fmul(stored, asked, flags=("contract",)), flags=("contract",))


class _Sums:
    """Code that sums something up over the elements of a few rows, each with those of a query."""

    def __init__(self, builder: Any, kind: Any, rows: list[Any], query: Any, add: Callable[..., Any]) -> None:
        self._builder = builder
        self._kind = kind
        self._rows, self._query = rows, query
        self._add = add

    def over(self, dim: Any) -> list[Any]:
        """Vectors, whose lanes are summed in the same order however many rows there are; then single elements.

        What does not fill CHAINS vectors is out of the way of rows that have nothing of it.
        """
        builder, word = self._builder, dim.type
        zero = ir.Constant(_VECTOR, None)
        chains = [[cgutils.alloca_once_value(builder, zero) for _ in range(CHAINS)] for _ in self._rows]
        step = ir.Constant(word, LANES * CHAINS)
        num_steps = builder.udiv(dim, step)
        for row, totals in zip(self._rows, chains, strict=True):
            with cgutils.for_range(builder, num_steps) as loop:
                place = builder.mul(loop.index, step)
                self._ask_ahead(row, place)
                for at, total in enumerate(totals):
                    self._add_to(total, row, builder.add(place, ir.Constant(word, at * LANES)), LANES)
        done = builder.mul(num_steps, step)
        is_more = builder.icmp_unsigned("<", done, dim)
        with builder.if_then(is_more, likely=False):
            self._add_vectors([totals[0] for totals in chains], done, dim)
        summed = [_sum_of(builder, [builder.load(total) for total in totals]) for totals in chains]
        totals = sums_of_four(builder, summed + [zero] * (ROWS - len(summed)), builder.fadd)
        lanes = (builder.extract_element(totals, ir.Constant(ir.IntType(32), at)) for at in range(len(summed)))
        ended = [cgutils.alloca_once_value(builder, lane) for lane in lanes]
        with builder.if_then(is_more, likely=False):
            self._add_elements(ended, dim)
        return [builder.load(total) for total in ended]

    def _add_vectors(self, totals: list[Any], first: Any, dim: Any) -> None:
        """Whole vectors from some place on."""
        builder, size = self._builder, ir.Constant(dim.type, LANES)
        num_vectors = builder.udiv(builder.sub(dim, first), size)
        for row, total in zip(self._rows, totals, strict=True):
            with cgutils.for_range(builder, num_vectors) as loop:
                self._add_to(total, row, builder.add(first, builder.mul(loop.index, size)), LANES)

    def _add_elements(self, totals: list[Any], dim: Any) -> None:
        """Those after the last whole vector."""
        builder = self._builder
        rest = builder.urem(dim, ir.Constant(dim.type, LANES))
        with cgutils.for_range(builder, rest) as loop:
            place = builder.add(builder.sub(dim, rest), loop.index)
            for row, total in zip(self._rows, totals, strict=True):
                self._add_to(total, row, place, 0)

    def _ask_ahead(self, row: Any, place: Any) -> None:
        """Asks memory for what will be read AHEAD_BYTES later than CHAINS vectors from some place on, line by line.

        Not for float32: its rows are so long that the processor does that by itself, and asking would disturb it. Nor
        for a single row, after which there are none, or others are read.
        """
        size = self._kind.bitwidth // 8
        if size == 4 or len(self._rows) == 1:
            return
        for ahead in range(AHEAD_BYTES, AHEAD_BYTES + LANES * CHAINS * size, LINE_BYTES):
            at = self._builder.add(place, ir.Constant(place.type, ahead // size))
            prefetch_line(self._builder, self._builder.gep(row, [at]))

    def _add_to(self, total: Any, row: Any, place: Any, lanes: int) -> None:
        """A vector of elements from some place on, or without lanes one."""
        builder = self._builder
        stored, asked = (_load(builder, pointer, place, lanes) for pointer in (row, self._query))
        stored = wide(builder, self._kind, stored, lanes)
        builder.store(self._add(builder, builder.load(total), stored, asked), total)


def _sum_of(builder: Any, vectors: list[Any]) -> Any:
    one, two, three, four = vectors
    return builder.fadd(builder.fadd(one, two), builder.fadd(three, four))


def _load(builder: Any, pointer: Any, place: Any, lanes: int) -> Any:
    at = builder.gep(pointer, [place])
    if not lanes:
        return builder.load(at)
    element = pointer.type.pointee
    size = element.width // 8 if isinstance(element, ir.IntType) else 4
    return builder.load(builder.bitcast(at, ir.VectorType(element, lanes).as_pointer()), align=size)


nearness, nearness_of_one = (_likeness(_apart, num_rows) for num_rows in (ROWS, 1))
"""-|row - query|^2 of ROWS rows, and of one."""
product, product_of_one = (_likeness(_product, num_rows) for num_rows in (ROWS, 1))
"""Inner products."""
