"""What numba has no words for: 16-bit floats, prefetching, and numbers that threads draw from one counter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from memstore.host.compiling import kernel

if TYPE_CHECKING:
    from collections.abc import Callable

AHEAD_BYTES = 16 << 10
"""How far ahead of its use memory is asked for a row, past the first cache: from 8 KiB on that hides the way."""

LINE_BYTES = 64
array_at = carray
"""An array in compiled code: of a `pointer`, a shape and a dtype."""

_ORDERING = "seq_cst"
_write = types.ExternalFunction("write", types.intp(types.intc, types.CPointer(types.int64), types.uintp))


def wide(builder: Any, element: Any, stored: Any, lanes: int = 0) -> Any:
    """An element of a numba type, or a vector of them, as float32: see `widened`."""

    def kind(of_one: Any) -> Any:
        return ir.VectorType(of_one, lanes) if lanes else of_one

    if element == types.uint16:
        return builder.fpext(builder.bitcast(stored, kind(ir.HalfType())), kind(ir.FloatType()))
    if element == types.int16:
        word = kind(ir.IntType(32))
        places = ir.Constant(word, [16] * lanes if lanes else 16)
        return builder.bitcast(builder.shl(builder.zext(stored, word), places), kind(ir.FloatType()))
    return stored


@intrinsic
def widened(_: Any, element: Any) -> Any:
    """An element as float32: the bits of a float16 (uint16) or of a bfloat16 (int16), or a float32."""

    def lower(__: Any, builder: Any, ___: Any, arguments: Any) -> Any:
        return wide(builder, element, arguments[0])

    return types.float32(element), lower


def sums_of_four(builder: Any, vectors: list[Any], add: Callable[[Any, Any], Any]) -> Any:
    """The sums over the lanes, 8 or 16, of four vectors, side by side: each addition is of lanes of two of them."""
    singles = (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)
    pairs = (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)

    def folded(first: Any, last: Any, lanes: tuple[tuple[int, ...], ...]) -> Any:
        kind = ir.VectorType(ir.IntType(32), len(lanes[0]))
        return add(*(builder.shuffle_vector(first, last, ir.Constant(kind, some)) for some in lanes))

    def halved(vector: Any) -> Any:
        half = vector.type.count // 2
        return folded(vector, vector, (tuple(range(half)), tuple(range(half, 2 * half))))

    if vectors[0].type.count == 16:
        vectors = [halved(vector) for vector in vectors]
    one, two, three, four = vectors
    return halved(folded(folded(one, two, singles), folded(three, four, singles), pairs))


def prefetch_line(builder: Any, pointer: Any) -> None:
    """Asks for a cache line, wherever that lies: what is not mapped is not fetched."""
    line = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    flags = [ir.Constant(ir.IntType(32), flag) for flag in (0, 2, 1)]  # to read, past the first cache, data
    kind = ir.FunctionType(ir.VoidType(), [line.type, *(flag.type for flag in flags)])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [line, *flags])


@intrinsic
def prefetch(_: Any, array: Any, element: Any) -> Any:
    """Asks for the cache line of `array.flat[element]`."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        prefetch_line(builder, builder.gep(view.data, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(array, types.intp), lower


@intrinsic
def pointer(_: Any, address: Any) -> Any:
    """What lies at an address, as `array_at` takes it."""

    def lower(__: Any, builder: Any, ___: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), lower


@intrinsic
def draw(_: Any, numbers: Any, place: Any) -> Any:
    """Adds one to an int64 of an array, and gives what it was: no two threads get the same."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw(
            "add", builder.gep(view.data, [arguments[1]]), ir.Constant(ir.IntType(64), 1), _ORDERING
        )

    return types.int64(numbers, types.intp), lower


@intrinsic
def raised(_: Any, numbers: Any, place: Any) -> Any:
    """Whether an int64 of an array was drawn from; what its drawer wrote before is then seen."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        number = builder.load_atomic(builder.gep(view.data, [arguments[1]]), _ORDERING, 8)
        return builder.icmp_signed("!=", number, ir.Constant(ir.IntType(64), 0))

    return types.boolean(numbers, types.intp), lower


@intrinsic
def _address(_: Any, array: Any) -> Any:
    """Where an int64 array lies."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.make_array(signature.args[0])(context, builder, arguments[0]).data

    return types.CPointer(types.int64)(array), lower


@kernel
def ring_bell(bell: int) -> None:
    """Wakes who waits for a descriptor, an eventfd or a pipe, without the interpreter lock that they will need."""
    one = np.ones(1, np.int64)
    _write(types.intc(bell), _address(one), types.uintp(8))
