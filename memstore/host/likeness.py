"""Likeness: of rows as they are stored to a query, a vector at a time.

A row's sum is taken in the same order alone and among others, so equal rows are equally like a query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from memstore.host.lowering import sums_of_four, wide
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
        """Whole vectors, whose lanes are summed in the same order however many rows there are; then single elements."""
        builder = self._builder
        summed = [self._vector_of(row, dim) for row in self._rows]
        no_rows = [ir.Constant(_VECTOR, None)] * (ROWS - len(summed))
        totals = sums_of_four(builder, summed + no_rows, builder.fadd)
        lanes = (builder.extract_element(totals, ir.Constant(ir.IntType(32), at)) for at in range(len(summed)))
        ended = [cgutils.alloca_once_value(builder, lane) for lane in lanes]
        rest = builder.urem(dim, ir.Constant(dim.type, LANES))
        with cgutils.for_range(builder, rest) as loop:
            place = builder.add(builder.sub(dim, rest), loop.index)
            for row, total in zip(self._rows, ended, strict=True):
                self._add_to(total, row, place, 0)
        return [builder.load(total) for total in ended]

    def _vector_of(self, row: Any, dim: Any) -> Any:
        """The sum of a row's whole vectors: CHAINS of them at a time, then one, as long as there are so many left."""
        builder, word = self._builder, dim.type
        chains = [cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, None)) for _ in range(CHAINS)]
        done = ir.Constant(word, 0)
        for totals in (chains, chains[:1]):
            step = ir.Constant(word, LANES * len(totals))
            num_steps = builder.udiv(builder.sub(dim, done), step)
            with cgutils.for_range(builder, num_steps) as loop:
                place = builder.add(done, builder.mul(loop.index, step))
                for at, total in enumerate(totals):
                    self._add_to(total, row, builder.add(place, ir.Constant(word, at * LANES)), LANES)
            done = builder.add(done, builder.mul(num_steps, step))
        one, two, three, four = (builder.load(chain) for chain in chains)
        return builder.fadd(builder.fadd(one, two), builder.fadd(three, four))

    def _add_to(self, total: Any, row: Any, place: Any, lanes: int) -> None:
        """A vector of elements from some place on, or without lanes one."""
        builder = self._builder
        stored, asked = (_load(builder, pointer, place, lanes) for pointer in (row, self._query))
        stored = wide(builder, self._kind, stored, lanes)
        builder.store(self._add(builder, builder.load(total), stored, asked), total)


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
