"""Likeness: of rows as they are stored to a query, a vector at a time.

A row's sum is taken in the same order alone and among others, so equal rows are equally like a query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from memstore.host.lowering import wide
from memstore.host.tiles import LANES

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = 4
"""Rows at once, one after the other: so many that beginning and ending them does not count."""

CHAINS = 4
"""Sums that are taken side by side, as one addition takes as long as beginning so many."""

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
            for at in range(num_rows):
                number = builder.add(arguments[1], ir.Constant(dim.type, at))
                first = builder.gep(stored.data, [builder.mul(number, dim)])
                total = _Sum(builder, signature.args[0].dtype, first, asked.data, add).over(dim)
                builder.store(total, builder.gep(into.data, [number]))
            return context.get_dummy_value()

        return types.void(keys, types.intp, query, scores), lower

    return likeness


def _apart(builder: Any, total: Any, stored: Any, asked: Any) -> Any:
    apart = builder.fsub(stored, asked)
    return builder.fsub(total, builder.fmul(apart, apart, flags=("contract",)), flags=("contract",))


def _product(builder: Any, total: Any, stored: Any, asked: Any) -> Any:
    return builder.fadd(total, builder.fmul(stored, asked, flags=("contract",)), flags=("contract",))


class _Sum:
    """Code that sums something up over the elements of a row and a query."""

    def __init__(self, builder: Any, kind: Any, row: Any, query: Any, add: Callable[..., Any]) -> None:
        self._builder = builder
        self._kind = kind
        self._row, self._query = row, query
        self._add = add

    def over(self, dim: Any) -> Any:
        """CHAINS vectors at a time, then one, then single elements, as long as there are so many left."""
        builder, word = self._builder, dim.type
        chains = [cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, None)) for _ in range(CHAINS)]
        done = ir.Constant(word, 0)
        for totals in (chains, chains[:1]):
            step = ir.Constant(word, LANES * len(totals))
            num_steps = builder.udiv(builder.sub(dim, done), step)
            with cgutils.for_range(builder, num_steps) as loop:
                place = builder.add(done, builder.mul(loop.index, step))
                for at, total in enumerate(totals):
                    self._add_to(total, builder.add(place, ir.Constant(word, at * LANES)), LANES)
            done = builder.add(done, builder.mul(num_steps, step))
        total = cgutils.alloca_once_value(builder, _over_lanes(builder, [builder.load(chain) for chain in chains]))
        with cgutils.for_range(builder, builder.sub(dim, done)) as loop:
            self._add_to(total, builder.add(done, loop.index), 0)
        return builder.load(total)

    def _add_to(self, total: Any, place: Any, lanes: int) -> None:
        """A vector of elements from some place on, or without lanes one."""
        builder = self._builder
        stored, asked = (_load(builder, pointer, place, lanes) for pointer in (self._row, self._query))
        stored = wide(builder, self._kind, stored, lanes)
        builder.store(self._add(builder, builder.load(total), stored, asked), total)


def _load(builder: Any, pointer: Any, place: Any, lanes: int) -> Any:
    at = builder.gep(pointer, [place])
    if not lanes:
        return builder.load(at)
    element = pointer.type.pointee
    size = element.width // 8 if isinstance(element, ir.IntType) else 4
    return builder.load(builder.bitcast(at, ir.VectorType(element, lanes).as_pointer()), align=size)


def _over_lanes(builder: Any, vectors: list[Any]) -> Any:
    """The sum of all lanes of all vectors."""
    while len(vectors) > 1:
        vectors = [builder.fadd(one, other) for one, other in zip(vectors[::2], vectors[1::2], strict=True)]
    kind = ir.FunctionType(_SINGLE, [_SINGLE, _VECTOR])
    reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
    return builder.call(reduce, [ir.Constant(_SINGLE, -0.0), vectors[0]], fastmath=("reassoc",))


nearness, nearness_of_one = (_likeness(_apart, num_rows) for num_rows in (ROWS, 1))
"""-|row - query|^2 of ROWS rows, and of one."""
product, product_of_one = (_likeness(_product, num_rows) for num_rows in (ROWS, 1))
"""Inner products."""
