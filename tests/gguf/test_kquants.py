"""The k-quant kernels against ggml's own, byte for byte, some three hundred thousand super-blocks."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import ggml_oracle
import numpy as np
import numpy.typing as npt
import pytest
from adversarial import Rows, adversarial

from converters.gguf.kernels.kq_lanes import LANES, SUPER
from converters.gguf.kernels.kquants import KERNELS
from converters.gguf.qtypes import QTYPES

pytestmark = pytest.mark.skipif(not ggml_oracle.available(), reason=ggml_oracle.MISSING)

each_type = pytest.mark.parametrize("name", KERNELS)


def ours(name: str, rows: Rows) -> npt.NDArray[np.uint8]:
    """The bytes of our kernel, written over a pattern: a byte that it forgets is seen."""
    size = QTYPES[name].size
    out = np.full((rows.shape[0], rows.shape[1] // SUPER * size), 0xA5, dtype=np.uint8)
    KERNELS[name](rows.view(np.uint32).reshape(-1, SUPER), out.reshape(-1, size))
    return out


def assert_same_bytes(name: str, rows: Rows) -> None:
    size = QTYPES[name].size
    got = ours(name, rows).reshape(-1, size)
    want = ggml_oracle.quantize(name, rows).reshape(-1, size)
    wrong = np.flatnonzero((got != want).any(axis=1))
    if wrong.size:
        n = wrong[0]
        at = np.flatnonzero(got[n] != want[n])
        raise AssertionError(
            f"{wrong.size} of {len(got)} super-blocks differ; number {n} at bytes {at}: "
            f"{got[n, at]}, ggml {want[n, at]}; values {rows.reshape(-1, SUPER)[n].tolist()}"
        )


def random_rows(distribution: str, rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    draw = {"normal": rng.standard_normal, "laplace": rng.laplace, "uniform": rng.uniform}[distribution]
    values = draw(size=shape)
    return np.asarray(values - 0.5 if distribution == "uniform" else values, dtype=np.float32)


@each_type
@pytest.mark.parametrize("distribution", ["normal", "laplace", "uniform"])
def test_random_rows_at_twenty_scales(name: str, distribution: str) -> None:
    rng = np.random.default_rng(11)
    rows = random_rows(distribution, rng, (20 * 49, 2048 + SUPER))
    scales = np.repeat(np.geomspace(1e-9, 1e4, 20), 49).astype(np.float32)
    assert_same_bytes(name, rows * scales[:, None])


@each_type
def test_values_of_every_exponent(name: str) -> None:
    """Random bits: every exponent, so denormals, sums that overflow, and quotients that leave all ranges."""
    rng = np.random.default_rng(12)
    bits = rng.integers(0, 1 << 32, (500, 2048), dtype=np.uint64).astype(np.uint32)
    rows = bits.view(np.float32)
    assert_same_bytes(name, np.where(np.isfinite(rows), rows, np.float32(1)))


@each_type
def test_sub_blocks_of_every_exponent(name: str) -> None:
    """Sub-blocks whose scales are far apart, so that many become 0, around offsets of every size."""
    rng = np.random.default_rng(13)
    shape = (1500, 8, SUPER // 16, 16)
    rows = rng.standard_normal(shape).astype(np.float32)
    rows *= np.float32(2) ** rng.integers(-40, 30, (*shape[:3], 1)).astype(np.float32)
    rows += np.float32(2) ** rng.integers(-40, 30, (*shape[:3], 1)) * rng.integers(-1, 2, (*shape[:3], 1))
    assert_same_bytes(name, rows.astype(np.float32).reshape(1500, -1))


@each_type
def test_values_from_small_sets(name: str) -> None:
    """Few different values: ties between tries, between levels, between peaks of both signs; zeros."""
    rng = np.random.default_rng(14)
    sets = ([0.0, 1.0], [-1.0, 1.0], [0.0, -0.0, 1.0], [-3.0, -0.5, 0.0, 0.5, 3.0], list(range(-8, 8)))
    for values, share in itertools.product(sets, (0.02, 0.3, 1.0)):
        rows = rng.choice(np.array(values, dtype=np.float32), (40, 2048))
        assert_same_bytes(name, np.where(rng.random(rows.shape) < share, rows, np.float32(0)))


@each_type
@pytest.mark.parametrize("rows", [pytest.param(row, id=key) for key, row in adversarial().items()])
def test_adversarial_rows(name: str, rows: Rows) -> None:
    assert_same_bytes(name, rows)


@each_type
def test_all_adversarial_rows_side_by_side(name: str) -> None:
    """In one call they share lanes: what one sub-block does must not touch its neighbours."""
    parts = [row.reshape(8, SUPER) for row in adversarial().values()]
    assert_same_bytes(name, np.concatenate(parts, axis=1))


@each_type
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (1, 3), (3, 1), (5, 1), (1, 5), (3, 3), (1, 7), (1, 8), (1, 9), (7, 5), (2, 11)]
)
def test_any_number_of_rows_and_super_blocks(name: str, shape: tuple[int, int]) -> None:
    """Also those that leave lanes empty; nothing is written past the end."""
    rows, blocks = shape
    values = np.random.default_rng(16).standard_normal((rows, blocks * SUPER)).astype(np.float32)
    size = QTYPES[name].nbytes(values.size)
    room = np.full(size + 4 * LANES, 0xA5, dtype=np.uint8)
    KERNELS[name](values.view(np.uint32).reshape(-1, SUPER), room[:size].reshape(rows * blocks, -1))
    assert (room[:size] == ggml_oracle.quantize(name, values).reshape(-1)).all()
    assert (room[size:] == 0xA5).all()


@each_type
def test_the_levels_of_the_search_stay_where_a_scale_becomes_zero(name: str) -> None:
    rows = np.random.default_rng(17).standard_normal((4, 2048)).astype(np.float32)
    rows.reshape(-1, SUPER)[:, 32:] *= np.float32(1e-4)
    alone = ours(name, rows)
    assert_same_bytes(name, rows)
    rows.reshape(-1, SUPER)[:, 32:] = 0
    assert (alone != ours(name, rows)).any(), "the small values left no trace: this test tests nothing"


@each_type
def test_threads_do_not_disturb_each_other(name: str) -> None:
    values = np.random.default_rng(18).standard_normal((16, 40, 2048)).astype(np.float32)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda rows: ours(name, rows), values))
    assert all((result == ours(name, rows)).all() for result, rows in zip(results, values, strict=True))
