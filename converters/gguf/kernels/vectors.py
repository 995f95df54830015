"""Vectors as values: WIDTH numbers that the kernels of the k-quants add, compare and choose in one go.

numba knows arrays and numbers; what a loop over lanes adds up, its compiler keeps in memory, and that costs
the searches half of their speed. A `Vector` is what LLVM calls one: `a * b + c` does WIDTH float32
operations twice, each rounded as IEEE says, none fused; a comparison returns booleans for `select`. A number
beside a vector counts for every lane. Importing this module imports numba.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.core.datamodel import PrimitiveModel
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, register_model

# What one register of AVX-512 or AVX2 holds: with two to a vector the searches would run out of registers.
WIDTH = 16 if get_host_cpu_features().get("avx512f") else 8


class Vector(types.Type):  # type: ignore[misc]
    """WIDTH numbers of one numba type."""

    def __init__(self, element: types.Type) -> None:
        self.element = element
        super().__init__(name=f"Vector({element})")


FLOATS, INTS, BOOLS = Vector(types.float32), Vector(types.int32), Vector(types.boolean)
_IR = {types.float32: ir.FloatType(), types.int32: ir.IntType(32), types.boolean: ir.IntType(1)}
_BYTES = ir.VectorType(ir.IntType(8), WIDTH)
# By the type of the operands: the type of the result, and what emits it for (builder, a, b).
Makes = dict[Vector, tuple[Vector, Callable[[Any, Any, Any], Any]]]


@register_model(Vector)
class _Model(PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir_of(kind))


def ir_of(kind: Vector) -> ir.VectorType:
    return ir.VectorType(_IR[kind.element], WIDTH)


def widened(context: Any, builder: Any, value: Any, kind: types.Type, to: Vector) -> Any:
    """A vector as it is; a number in every lane."""
    if isinstance(kind, Vector):
        return value
    number = context.cast(builder, value, kind, to.element)
    one = builder.insert_element(ir.Constant(ir_of(to), ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), None)
    return builder.shuffle_vector(one, ir.Constant(ir_of(to), ir.Undefined), zeros)


def _operator(function: Any, makes: Makes) -> None:
    """Teach numba the operator `function` for vectors: result and instruction by the type of the operands."""

    @infer_global(function)
    class Typing(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            vectors = [kind for kind in args if isinstance(kind, Vector)]
            if not vectors or vectors[0] not in makes:
                return None
            both = [kind if isinstance(kind, Vector) else vectors[0].element for kind in args]
            return signature(makes[vectors[0]][0], *both)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = next(kind for kind in sig.args if isinstance(kind, Vector))
        pair = [widened(context, builder, *one, kind) for one in zip(args, sig.args, strict=True)]
        return makes[kind][1](builder, *pair)

    for left, right in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(function, left, right)(lower)


def _compare(sign: str) -> Makes:
    floats = "fcmp_unordered" if sign == "!=" else "fcmp_ordered"
    return {FLOATS: (BOOLS, partial(_call, floats, sign)), INTS: (BOOLS, partial(_call, "icmp_signed", sign))}


def _arithmetic(name: str) -> Makes:
    return {FLOATS: (FLOATS, partial(_call, "f" + name)), INTS: (INTS, partial(_call, name))}


def _logic(name: str) -> Makes:
    return {kind: (kind, partial(_call, name)) for kind in (INTS, BOOLS)}


def _call(name: str, *rest: Any) -> Any:
    """builder.name(...), the builder being the last but two: after what `partial` gave."""
    *given, builder, a, b = rest
    return getattr(builder, name)(*given, a, b)


_OPERATORS: dict[Any, Makes] = {
    operator.add: _arithmetic("add"),
    operator.iadd: _arithmetic("add"),
    operator.sub: _arithmetic("sub"),
    operator.mul: _arithmetic("mul"),
    operator.truediv: {FLOATS: (FLOATS, partial(_call, "fdiv"))},
    operator.and_: _logic("and_"),
    operator.or_: _logic("or_"),
    operator.ior: _logic("or_"),
    operator.xor: _logic("xor"),
    operator.lshift: {INTS: (INTS, partial(_call, "shl"))},
    operator.rshift: {INTS: (INTS, partial(_call, "ashr"))},
    operator.lt: _compare("<"),
    operator.gt: _compare(">"),
    operator.eq: _compare("=="),
    operator.ne: _compare("!="),
}
for _function, _makes in _OPERATORS.items():
    _operator(_function, _makes)


@intrinsic
def vector(context: Any, number: Any) -> Any:
    """A float32 in every lane."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return widened(context, builder, values[0], signature.args[0], FLOATS)

    return FLOATS(types.float32), emit


@intrinsic
def select(context: Any, condition: Any, chosen: Any, other: Any) -> Any:
    """`chosen` where `condition` holds, else `other`: a blend, where Python's own would be a branch.

    Of numbers, or lane by lane of vectors, where one of the two may be a number.
    """
    kind = chosen if isinstance(chosen, Vector) else other

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pair = [values[1], values[2]]
        if isinstance(kind, Vector):
            pair = [widened(context, builder, values[n], signature.args[n], kind) for n in (1, 2)]
        return builder.select(values[0], *pair)

    if not isinstance(kind, Vector):
        return chosen(types.boolean, chosen, chosen), emit
    both = [side if isinstance(side, Vector) else kind.element for side in (chosen, other)]
    return kind(condition, *both), emit


def _unary(name: str) -> Any:
    @intrinsic
    def apply(context: Any, x: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            kind = ir.FunctionType(ir_of(FLOATS), [ir_of(FLOATS)])
            function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{WIDTH}f32")
            return builder.call(function, values)

        return FLOATS(FLOATS), emit

    return apply


magnitude = _unary("fabs")
root = _unary("sqrt")


@intrinsic
def as_ints(context: Any, x: Any) -> Any:
    """The bits of floats."""
    return INTS(FLOATS), lambda context, builder, sig, values: builder.bitcast(values[0], ir_of(INTS))


@intrinsic
def as_floats(context: Any, x: Any) -> Any:
    """The floats that bits stand for."""
    return FLOATS(INTS), lambda context, builder, sig, values: builder.bitcast(values[0], ir_of(FLOATS))


@intrinsic
def to_floats(context: Any, x: Any) -> Any:
    """The numbers of ints."""
    return FLOATS(INTS), lambda context, builder, sig, values: builder.sitofp(values[0], ir_of(FLOATS))


@intrinsic
def lanes_of(context: Any, condition: Any) -> Any:
    """The lanes where `condition` holds, as the bits of an int64, lane 0 lowest."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.zext(builder.bitcast(values[0], ir.IntType(WIDTH)), ir.IntType(64))

    return types.int64(BOOLS), emit


def address(context: Any, builder: Any, array: tuple[Any, Any], at: list[Any], to: Any) -> Any:
    """Where array[at] lies, as the address of a `to`; `array` is its type and value."""
    made = context.make_array(array[0])(context, builder, array[1])
    where = cgutils.get_item_pointer(context, builder, array[0], made, at, wraparound=False)
    return builder.bitcast(where, to.as_pointer())


def indices(context: Any, builder: Any, kind: Any, value: Any) -> list[Any]:
    """The indices of a tuple."""
    indices = zip(cgutils.unpack_tuple(builder, value), kind.types, strict=True)
    return [context.cast(builder, index, one, types.intp) for index, one in indices]


@intrinsic
def load(context: Any, array: Any, at: Any) -> Any:
    """The WIDTH float32 or int32 from array[at] on; `at` is a tuple, one index a dimension."""
    kind = INTS if array.dtype == types.int32 else FLOATS

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        at = indices(context, builder, signature.args[1], values[1])
        return builder.load(address(context, builder, (array, values[0]), at, ir_of(kind)), align=4)

    return kind(array, at), emit


@intrinsic
def store(context: Any, array: Any, at: Any, x: Any) -> Any:
    """Write a vector from array[at] on: floats, ints, or the low bytes of ints into an array of bytes."""
    low_bytes = x == INTS and array.dtype != types.int32

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        value = builder.trunc(values[2], _BYTES) if low_bytes else values[2]
        at = indices(context, builder, signature.args[1], values[1])
        where = address(context, builder, (array, values[0]), at, value.type)
        builder.store(value, where, align=1 if low_bytes else 4)
        return context.get_dummy_value()

    return types.void(array, at, x), emit


@intrinsic
def store_turned(context: Any, x: Any, which: Any, j: Any, out: Any, i: Any) -> Any:
    """out[k, i + lane] = x[which[i + lane], j + k] for k and lane below WIDTH, by shuffling registers.

    Where `which` ends, its last number counts for the lanes left over.
    """

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        def number(n: int) -> Any:
            return context.get_constant(types.intp, n)

        _, numbers, column, target, first = values
        size = builder.extract_value(context.make_array(which)(context, builder, numbers).shape, 0)
        last = builder.sub(size, number(1))
        rows = []
        for lane in range(WIDTH):
            at = builder.add(first, number(lane))
            at = builder.select(builder.icmp_signed("<", at, last), at, last)
            row = builder.load(address(context, builder, (which, numbers), [at], ir.IntType(64)))
            where = address(context, builder, (x, values[0]), [row, column], ir_of(FLOATS))
            rows.append(builder.load(where, align=4))
        for k, turned in enumerate(_turned(builder, rows)):
            at = [builder.add(column, number(k)), first]
            builder.store(turned, address(context, builder, (out, target), at, ir_of(FLOATS)), align=4)
        return context.get_dummy_value()

    return types.void(x, which, types.intp, out, types.intp), emit


def _turned(builder: Any, rows: list[Any]) -> list[Any]:
    """The transpose of WIDTH vectors: within quarters of a register first, where shuffles are cheap."""

    def shuffle(a: Any, b: Any, order: list[int]) -> Any:
        kind = ir.VectorType(ir.IntType(32), len(order))
        return builder.shuffle_vector(a, b, ir.Constant(kind, order))

    def by_quarters(order: list[int]) -> list[int]:
        # Of each quarter: numbers below 4 are of the first vector, from 4 on of the second.
        return [
            4 * quarter + number % 4 + WIDTH * (number // 4)
            for quarter in range(WIDTH // 4)
            for number in order
        ]

    pairs = [
        shuffle(rows[n], rows[n + 1], by_quarters(order))
        for n in range(0, WIDTH, 2)
        for order in ([0, 4, 1, 5], [2, 6, 3, 7])
    ]
    fours = [
        shuffle(pairs[n + side], pairs[n + side + 2], by_quarters(order))
        for n in range(0, WIDTH, 4)
        for side in (0, 1)
        for order in ([0, 1, 4, 5], [2, 3, 6, 7])
    ]
    # fours[4 * n + k], quarter m: column 4 * m + k of rows 4 * n and the three after it.
    columns = []
    for m in range(WIDTH // 4):
        quarter = list(range(4 * m, 4 * m + 4))
        order = quarter + [WIDTH + number for number in quarter]
        for k in range(4):
            joined = [shuffle(fours[n], fours[n + 4], order) for n in range(k, WIDTH, 8)]
            columns.append(joined[0] if WIDTH == 8 else shuffle(joined[0], joined[1], list(range(WIDTH))))
    return columns
