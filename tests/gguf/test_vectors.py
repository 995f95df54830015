"""The vector type of the kernels against numpy: every operator, numbers beside vectors, turning, masks."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from numpy import float32, int32

from converters.gguf.kernels.kq_lanes import nearest_int, nearest_ints
from converters.gguf.kernels.vectors import (
    WIDTH,
    as_floats,
    as_ints,
    lanes_of,
    load,
    magnitude,
    root,
    select,
    store,
    store_turned,
    to_floats,
    vector,
)
from dsconvert.compile import inlined

TINY, HUGE = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, TINY, -TINY, HUGE, 1e-38, 0.1], np.float32)
A, B = (side.ravel().astype(np.float32) for side in np.meshgrid(SPECIAL, SPECIAL))
COUNT = len(A) // WIDTH * WIDTH
A, B = A[:COUNT], B[:COUNT]


def run(function: Callable[[Any, Any], Any]) -> Any:
    """What a function of two vectors gives for all pairs of special numbers."""
    inner = inlined(function)

    @numba.njit
    def over(a: Any, b: Any, out: Any) -> None:
        for i in range(0, len(a), WIDTH):
            store(out, (i,), inner(load(a, (i,)), load(b, (i,))))

    out = np.empty(COUNT, np.float32)
    over(A, B, out)
    return out


def assert_same_bits(got: Any, want: Any) -> None:
    want = np.asarray(want, np.float32)
    numbers = ~np.isnan(want)
    assert (np.isnan(got) == ~numbers).all()
    assert (got.view(np.uint32)[numbers] == want.view(np.uint32)[numbers]).all()


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv"])
def test_arithmetic_is_ieee_float32(name: str) -> None:
    function = getattr(operator, name)
    with np.errstate(all="ignore"):
        assert_same_bits(run(lambda a, b: function(a, b)), function(A, B))  # noqa: PLW0108 (numba wants a def)
        assert_same_bits(run(lambda a, b: function(a, float32(0.1))), function(A, np.float32(0.1)))
        assert_same_bits(run(lambda a, b: function(float32(0.1), b)), function(np.float32(0.1), B))


def test_a_product_and_a_sum_are_not_fused() -> None:
    with np.errstate(all="ignore"):
        x = np.float32(1) + np.float32(2) ** -12
        assert_same_bits(run(lambda a, b: vector(x) * x - x), np.full(COUNT, x * x - x))


@pytest.mark.parametrize("name", ["lt", "gt", "eq", "ne"])
def test_comparisons_choose_lane_by_lane(name: str) -> None:
    function = getattr(operator, name)
    assert_same_bits(run(lambda a, b: select(function(a, b), a, float32(7))), np.where(function(A, B), A, 7))


def test_magnitude_and_root() -> None:
    with np.errstate(all="ignore"):
        assert_same_bits(run(lambda a, b: root(magnitude(a))), np.sqrt(np.abs(A)))


def test_bits() -> None:
    assert_same_bits(run(lambda a, b: as_floats(as_ints(a) & int32(0x7FFFFFFF))), np.abs(A))
    assert_same_bits(run(lambda a, b: to_floats(as_ints(a) ^ as_ints(a) | int32(5))), np.full(COUNT, 5))
    with np.errstate(all="ignore"):
        assert_same_bits(run(lambda a, b: to_floats(as_ints(a) << int32(3))), A.view(np.int32) << 3)
        assert_same_bits(run(lambda a, b: to_floats(as_ints(a) >> int32(3))), A.view(np.int32) >> 3)


def test_lanes_of_numbers_the_lanes_from_the_lowest_bit() -> None:
    @numba.njit
    def negative(x: Any) -> Any:
        return lanes_of(load(x, (0,)) < float32(0))

    for lane in range(WIDTH):
        x = np.ones(WIDTH, np.float32)
        x[[0, lane]] = -1
        assert negative(x) == 1 | 1 << lane


def test_the_nearest_int_of_a_vector_is_that_of_each_number() -> None:
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 1 << 32, 4096 * WIDTH, dtype=np.uint64).astype(np.uint32)
    x = np.concatenate([bits.view(np.float32), (np.arange(256 * WIDTH) / 2 - 64 * WIDTH).astype(np.float32)])

    @numba.njit
    def each(x: Any, out: Any, expected: Any) -> None:
        for i in range(0, len(x), WIDTH):
            store(out, (i,), as_floats(nearest_ints(load(x, (i,)))))
        for i in range(len(x)):
            expected[i] = nearest_int(x[i])

    out, expected = np.empty(len(x), np.float32), np.empty(len(x), np.int32)
    each(np.where(np.isnan(x), np.float32(0), x), out, expected)
    assert (out.view(np.int32) == expected).all()


@pytest.mark.parametrize("columns", [16, 32])
def test_rows_are_turned_into_columns_and_the_last_fills_what_is_left(columns: int) -> None:
    @numba.njit
    def turn(x: Any, which: Any, out: Any) -> None:
        for i in range(0, out.shape[1], WIDTH):
            for j in range(0, x.shape[1], WIDTH):
                store_turned(x, which, j, out, i)

    x = np.random.default_rng(4).standard_normal((70, columns)).astype(np.float32)
    for which in (np.arange(32), np.array([5]), np.array([69, 3, 3, 0, 68, 7, 21, 1, 2, 40, 41])):
        out = np.empty((columns, 32), np.float32)
        turn(x, which, out)
        padded = np.concatenate([which, np.full(32 - len(which), which[-1])])
        assert (out == x[padded].T).all()
