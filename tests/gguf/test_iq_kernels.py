"""iq, tq and fp4 types against ggml's bytes, without a matrix and at the edges of their own searches."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path

import ggml_oracle
import numpy as np
import numpy.typing as npt
import pytest
from adversarial import adversarial
from kernels_pieces import assert_same_bytes, ours

from converters.gguf.kernels import NONFINITE, OVERFLOW, grids, nonlinear, quantize
from converters.gguf.kernels.grid_vectors import lane_of, lowest
from converters.gguf.kernels.vectors import WIDTH, load
from converters.gguf.qtypes import NEEDED, QTYPES
from dsconvert.compile import kernel

needs_ggml = pytest.mark.skipif(not ggml_oracle.available(), reason=ggml_oracle.MISSING)
GRIDS = tuple(grids.DISTANCES)
TYPES = [name for name in QTYPES if name[0] in "itmn"]
each_type = pytest.mark.parametrize("name", TYPES)
each_iq = pytest.mark.parametrize("name", [name for name in TYPES if name[0] == "i"])
each_grid = pytest.mark.parametrize("name", GRIDS)


@needs_ggml
@each_type
def test_adversarial_rows(name: str) -> None:
    rows = [ggml_oracle.bearable(name, row) for row in adversarial().values()]
    for row in rows:
        assert_same_bytes(name, row)
    assert_same_bytes(name, np.concatenate(rows, axis=1))


@needs_ggml
@each_type
def test_values_of_every_exponent(name: str) -> None:
    rng = np.random.default_rng(31)
    rows = rng.integers(0, 1 << 32, (120, 2048), dtype=np.uint64).astype(np.uint32).view(np.float32)
    assert_same_bytes(name, ggml_oracle.bearable(name, np.where(np.isfinite(rows), rows, np.float32(1))))


@needs_ggml
@each_type
def test_values_from_small_sets(name: str) -> None:
    """Ties between tries, levels and points of a grid; many zeros."""
    rng = np.random.default_rng(32)
    sets = ([0.0, 1.0], [-1.0, 1.0], [0.0, -0.0, 1.0], [-3.0, -0.5, 0.0, 0.5, 3.0], list(range(-8, 8)))
    for values, share in itertools.product(sets, (0.02, 0.3, 1.0)):
        rows = rng.choice(np.array(values, dtype=np.float32), (20, 2048))
        assert_same_bytes(name, np.where(rng.random(rows.shape) < share, rows, np.float32(0)))


@needs_ggml
@each_type
def test_heavy_tails_and_sub_blocks_far_apart(name: str) -> None:
    rng = np.random.default_rng(33)
    tails = rng.standard_t(2, (60, 2048)).astype(np.float32)
    assert_same_bytes(name, tails)
    shape = (60, 2048 // 16, 16)
    rows = rng.standard_normal(shape).astype(np.float32)
    rows *= np.float32(2) ** rng.integers(-30, 12, (*shape[:2], 1)).astype(np.float32)
    assert_same_bytes(name, rows.reshape(60, 2048))


@needs_ggml
def test_mxfp4_next_to_powers_of_two() -> None:
    """ggml rounds the logarithm before it takes the exponent, and ties between levels go towards zero."""
    powers = np.float32(2.0) ** np.arange(-140, 128, dtype=np.float32)
    near = np.concatenate([(powers.view(np.uint32) - n).view(np.float32) for n in range(9)])
    rows = np.zeros((near.size, 32), np.float32)
    rows[:, 3] = near
    rows[:, 20:] = near[:, None] * np.linspace(-1, 1, 12, dtype=np.float32)
    assert_same_bytes("mxfp4", rows)
    ties = np.arange(-64, 64, dtype=np.float32).repeat(32).reshape(-1, 32)
    ties[:, 0] = 96
    assert_same_bytes("mxfp4", ties / np.float32(8))


@needs_ggml
def test_nvfp4_at_every_scale_and_between() -> None:
    """Scales are rounded halves up, and the last exponent is the largest number alone."""
    exact = np.concatenate(
        [np.arange(8) / 512, np.outer(2.0 ** np.arange(-6, 9), 1 + np.arange(8) / 8).ravel()]
    )
    near = np.concatenate([exact, (exact[:-1] + exact[1:]) / 2]).astype(np.float32) * np.float32(6)
    near = np.concatenate([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(1e9))])
    rows = near[:, None] * np.tile(np.linspace(-1, 1, 16, dtype=np.float32), 4)
    assert_same_bytes("nvfp4", rows)
    assert ours("nvfp4", rows[np.abs(rows).max(axis=1) <= 2688])[1] == 0
    assert ours("nvfp4", rows[np.abs(rows).max(axis=1) > 2688])[1] == OVERFLOW


@needs_ggml
@pytest.mark.parametrize("name", ["tq1_0", "tq2_0", "mxfp4", "nvfp4"])
def test_a_matrix_changes_nothing(name: str) -> None:
    rng = np.random.default_rng(34)
    rows, importance = rng.standard_normal((3, 512)).astype(np.float32), rng.random(512, np.float32)
    out = np.empty((3, QTYPES[name].nbytes(512)), np.uint8)
    assert quantize(QTYPES[name], rows, out, importance) == 0
    assert (out == ours(name, rows)[0]).all()
    assert (out == ggml_oracle.quantize(name, rows, importance)).all()


@pytest.mark.parametrize("name", [name for name in QTYPES if QTYPES[name].importance == NEEDED])
def test_a_type_that_has_no_way_without_a_matrix_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} needs importance"):
        quantize(QTYPES[name], np.ones((1, 256), np.float32), np.empty((1, QTYPES[name].size), np.uint8))


@each_grid
def test_values_that_overflow_are_flagged_and_end_nothing(name: str) -> None:
    """ggml's process ends here; ours tells, and stays within its arrays for whatever it is given."""
    rng = np.random.default_rng(35)
    rows = rng.integers(0, 1 << 32, (40, 512), dtype=np.uint64).astype(np.uint32).view(np.float32)
    assert ours(name, rows)[1] & NONFINITE
    finite = np.where(np.isfinite(rows), rows, np.float32(1))
    assert ours(name, finite)[1] & OVERFLOW


@each_iq
def test_one_sub_block_beyond_all_scales_is_flagged(name: str) -> None:
    """Its squares are infinite, its scale no number, and the rest of the block looks faultless."""
    rows = np.random.default_rng(38).standard_normal((3, 512)).astype(np.float32)
    assert ours(name, rows)[1] == 0
    rows[1, 70] = 1e25
    assert ours(name, rows)[1] == OVERFLOW


@each_grid
def test_candidates_are_the_nearest_points_in_order(name: str) -> None:
    """Against a plain sort, cell by cell; a point of the grid has itself alone."""
    points, found = grids.points(name).astype(int), grids.grid(name)
    size = points.shape[1]
    bits, top = grids.BITS[size], grids.TOPS[size]
    codes = grids.packed(points.astype(np.uint8))
    rng = np.random.default_rng(36)
    for group in [*points[:20], *rng.integers(0, top, (200, size))]:
        cell = sum(int(level) << bits * j for j, level in enumerate(group))
        start, vectors, number = found.cells[cell]
        distance = ((points - group) ** 2).sum(axis=1)
        order = sorted(range(len(points)), key=lambda p: (distance[p], p))
        limit = sorted(set(distance))[0 if distance[order[0]] == 0 else grids.DISTANCES[name] - 1]
        expected = [codes[p] for p in order if distance[p] <= limit]
        stored = found.codes[start : start + vectors * WIDTH].reshape(vectors, WIDTH).T.reshape(-1)
        assert stored[: len(expected)].tolist() == expected
        assert set(stored[len(expected) :].tolist()) <= {expected[-1]}
        assert number == (order[0] if distance[order[0]] == 0 else -1)


@kernel
def _first_lowest(numbers: npt.NDArray[np.int32]) -> int:
    vector = load(numbers, (0,))
    lane = lowest(vector)
    return int(lane) * 1000 + int(lane_of(vector, lane))


def test_of_equal_numbers_the_first_lane_counts() -> None:
    numbers = np.full(WIDTH, 9, np.int32)
    numbers[3], numbers[5] = 4, 4
    assert _first_lowest(numbers) == 3004


def test_edges_lie_where_distances_change_sides() -> None:
    """From the edge on the upper value is taken, and below it the lower: by ggml's float32 comparison."""
    for low, high, edge in zip(nonlinear.VALUES, nonlinear.VALUES[1:], nonlinear.EDGES, strict=False):
        below = np.nextafter(edge, np.float32(-np.inf))
        assert below - low < high - below
        assert not edge - low < high - edge


# A process whose processor lacks the features that begin with the first argument.
ELSEWHERE = """
import sys
import numpy as np
import llvmlite.binding as llvm

real = llvm.get_host_cpu_features()
kept = type(real)({name: on and not name.startswith(sys.argv[1]) for name, on in real.items()})
llvm.get_host_cpu_features = lambda: kept
from converters.gguf.kernels import grid_vectors, quantize, vectors
from converters.gguf.qtypes import QTYPES

rows = np.random.default_rng(39).standard_normal((9, 1024)).astype(np.float32)
out = np.empty((9, QTYPES[sys.argv[2]].nbytes(1024)), np.uint8)
quantize(QTYPES[sys.argv[2]], rows, out, np.abs(rows[0]))
print(vectors.WIDTH, grid_vectors.PICK or "by hand", out.tobytes().hex())
"""


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("iq3_s", "iq2_xs")]  # to compile


@needs_ggml
@pytest.mark.parametrize("name", ["iq4_xs", *SLOW])
def test_other_processors_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    """Vectors of 8, and lanes picked one by one where there is no instruction for it."""
    rows = np.random.default_rng(39).standard_normal((9, 1024)).astype(np.float32)
    want = ggml_oracle.quantize(name, rows, np.abs(rows[0])).tobytes().hex()
    kinds = set()
    for lacking in ("avx512", "avx"):
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, lacking, name],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        *kind, got = done.stdout.split()
        kinds.add(tuple(kind))
        assert got == want, kind
    assert ("8", "by", "hand") in kinds


@needs_ggml
@each_type
def test_readers_agree(name: str) -> None:
    """The values that files are checked with are those of ggml's own reader, to the bit."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf library")
    rows = np.random.default_rng(37).standard_normal((8, 1024)).astype(np.float32)
    data = ours(name, rows)[0]
    values = np.empty(rows.size, np.float32)
    read = getattr(ggml_oracle.library(), f"dequantize_row_{name}")
    read(
        data.ctypes.data_as(ctypes.c_void_p),
        values.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(rows.size),
    )
    found = gguf.dequantize(data, gguf.GGMLQuantizationType(QTYPES[name].ggml))
    assert np.array_equal(found.reshape(-1), values)
    assert np.square(values.reshape(rows.shape) - rows).mean() < 0.7  # it is these rows that it reads
