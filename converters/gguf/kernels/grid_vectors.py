"""The vector instructions of the search on a grid; see vectors for what a vector is.

The distance of a group of values to WIDTH candidates at once: the weighted square of each value's difference
to each level is computed first, 32 numbers in registers, and each candidate picks its own from there. Where a
processor cannot pick lanes of a register by a vector of numbers, it is done one by one: slower, the same.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from converters.gguf.kernels.vectors import FLOATS, INTS, WIDTH, address, indices, ir_of, widened

INT, FLOAT = ir.IntType(32), ir.FloatType()
TERMS = 32  # 4 values of 8 levels, or 8 of 4
# The instruction that picks lanes; none: by hand.
PICK = {
    16: "llvm.x86.avx512.permvar.sf.512",
    8: "llvm.x86.avx2.permps" if get_host_cpu_features().get("avx2") else "",
}[WIDTH]


@intrinsic
def distances(context: Any, x: Any, w: Any, at: Any, scale: Any, codes: Any, start: Any, shifts: Any) -> Any:
    """The bits of sum w (scale * (2 level + 1) - x)^2 for the WIDTH candidates from codes[start] on.

    x[at] and w[at] are the first of the group's values; there are as many as `shifts`, a tuple, is long: 4
    or 8. The sum goes from value 0 on, in float32.
    """
    size = shifts.count
    levels = TERMS // size
    per = WIDTH // levels  # values whose terms share a register

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        where = indices(context, builder, signature.args[2], values[2])
        step = widened(context, builder, values[3], types.float32, FLOATS)
        group = [
            builder.load(address(context, builder, array, where, ir.VectorType(FLOAT, size)), align=4)
            for array in ((x, values[0]), (w, values[1]))
        ]
        terms = []
        for first in range(0, size, per):
            order = ir.Constant(ir.VectorType(INT, WIDTH), [first + n // levels for n in range(WIDTH)])
            odd = ir.Constant(ir_of(FLOATS), [2.0 * (n % levels) + 1 for n in range(WIDTH)])
            value, weight = (builder.shuffle_vector(one, one, order) for one in group)
            off = builder.fsub(builder.fmul(step, odd), value)
            terms.append(builder.fmul(builder.fmul(weight, off), off))
        at_codes = address(context, builder, (codes, values[4]), [values[5]], ir_of(INTS))
        code = builder.load(at_codes, align=4)
        total = None
        for j in range(size):
            shift = ir.Constant(ir_of(INTS), [4 * j] * WIDTH)
            term = _picked(builder, terms[j // per], builder.lshr(code, shift))
            total = term if total is None else builder.fadd(total, term)
        return builder.bitcast(total, ir_of(INTS))

    return INTS(x, w, at, types.float32, codes, types.intp, shifts), emit


def _picked(builder: Any, table: Any, at: Any) -> Any:
    """table[at % WIDTH] in each lane."""
    if PICK:
        kind = ir.FunctionType(ir_of(FLOATS), [ir_of(FLOATS), ir_of(INTS)])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, PICK), [table, at])
    at = builder.and_(at, ir.Constant(ir_of(INTS), [WIDTH - 1] * WIDTH))
    picked = ir.Constant(ir_of(FLOATS), ir.Undefined)
    for n in range(WIDTH):
        lane = ir.Constant(INT, n)
        number = builder.extract_element(table, builder.extract_element(at, lane))
        picked = builder.insert_element(picked, number, lane)
    return picked


@intrinsic
def lowest(context: Any, x: Any) -> Any:
    """The first lane that holds the smallest of INTS, which are not negative."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(INT, [ir_of(INTS)])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.umin.v{WIDTH}i32")
        least = widened(context, builder, builder.call(reduce, values), types.int32, INTS)
        same = builder.bitcast(builder.icmp_signed("==", values[0], least), ir.IntType(WIDTH))
        return builder.zext(builder.cttz(same, ir.Constant(ir.IntType(1), 0)), ir.IntType(64))

    return types.int64(INTS), emit


@intrinsic
def lane_of(context: Any, x: Any, lane: Any) -> Any:
    """The number in one lane of INTS."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.extract_element(values[0], values[1])

    return types.int32(INTS, types.int64), emit
