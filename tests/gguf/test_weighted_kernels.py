"""The kernels with an importance matrix against ggml's own with the same matrix, byte for byte."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import ggml_oracle
import numpy as np
import numpy.typing as npt
import pytest
from adversarial import adversarial

from converters.gguf import kernels
from converters.gguf.kernels import quantize
from converters.gguf.qtypes import IGNORED, NEEDED, QTYPES

needs_ggml = pytest.mark.skipif(not ggml_oracle.available(), reason=ggml_oracle.MISSING)

Rows = npt.NDArray[np.float32]
TAKERS = [name for name, kind in QTYPES.items() if kind.importance != IGNORED]
each_type = pytest.mark.parametrize("name", TAKERS)
COLUMNS = 2048 + 256


def ours(name: str, rows: npt.NDArray[np.generic], importance: Rows) -> npt.NDArray[np.uint8]:
    """Our bytes, written over a pattern: a byte that is forgotten is seen."""
    out = np.full((rows.shape[0], QTYPES[name].nbytes(rows.shape[1])), 0xA5, dtype=np.uint8)
    quantize(QTYPES[name], rows, out, importance)
    return out


def assert_same_bytes(name: str, rows: Rows, importance: Rows) -> None:
    size = QTYPES[name].size
    got = ours(name, rows, importance).reshape(-1, size)
    want = ggml_oracle.quantize(name, rows, importance).reshape(-1, size)
    wrong = np.flatnonzero((got != want).any(axis=1))
    if wrong.size:
        n = wrong[0]
        at = np.flatnonzero(got[n] != want[n])
        block = QTYPES[name].block
        raise AssertionError(
            f"{wrong.size} of {len(got)} blocks differ; number {n} at bytes {at}: {got[n, at]}, "
            f"ggml {want[n, at]}; values {rows.reshape(-1, block)[n].tolist()}"
        )


def matrices(columns: int) -> dict[str, Rows]:
    """Importance as it comes, and as it should not."""
    rng = np.random.default_rng(21)
    at = np.arange(columns)
    wild = rng.lognormal(sigma=4, size=columns)
    found = {
        "one for all": np.ones(columns),
        "spread over decades": wild,
        "zeros here and there": np.where(rng.random(columns) < 0.3, 0.0, wild),
        "zero for whole blocks": np.where(at // 16 % 3 == 1, 0.0, wild),
        "zero for whole super-blocks": np.where(at // 256 % 2 == 0, 0.0, wild),
        "one column alone": (at % 32 == 7) * 1.0,
        "nothing": np.zeros(columns),
        "tiny": wild * 1e-30,
        "denormal": wild * 1e-43,
        "huge": wild * 1e20,
    }
    return {key: np.asarray(values, dtype=np.float32) for key, values in found.items()}


@needs_ggml
@each_type
@pytest.mark.parametrize("importance", [pytest.param(m, id=key) for key, m in matrices(COLUMNS).items()])
def test_random_rows_at_ten_scales(name: str, importance: Rows) -> None:
    rng = np.random.default_rng(22)
    draws = (rng.standard_normal, rng.laplace)
    rows = np.concatenate([draw(size=(30, COLUMNS)) for draw in draws]).astype(np.float32)
    scales = np.resize(np.geomspace(1e-9, 1e4, 10), len(rows)).astype(np.float32)
    assert_same_bytes(name, rows * scales[:, None], importance)


@needs_ggml
@each_type
def test_adversarial_rows(name: str) -> None:
    """Alone, so that a row's own mean square rules it, and side by side, where they share lanes."""
    rows = {key: row for key, row in adversarial().items() if (ggml_oracle.bearable(name, row) == row).all()}
    assert len(rows) > 25
    for importance in matrices(2048).values():
        for key, row in rows.items():
            try:
                assert_same_bytes(name, row, importance)
            except AssertionError as error:
                raise AssertionError(f"{key}: {error}") from None
        assert_same_bytes(name, np.concatenate(list(rows.values())), importance)


@needs_ggml
@each_type
def test_values_of_every_exponent(name: str) -> None:
    rng = np.random.default_rng(23)
    bits = rng.integers(0, 1 << 32, (60, 2048), dtype=np.uint64).astype(np.uint32)
    rows = bits.view(np.float32)
    rows = ggml_oracle.bearable(name, np.where(np.isfinite(rows), rows, np.float32(1)))
    for importance in matrices(2048).values():
        assert_same_bytes(name, rows, importance)


@needs_ggml
@each_type
def test_values_from_small_sets(name: str) -> None:
    """Ties between tries and between levels; many zeros."""
    rng = np.random.default_rng(24)
    sets = ([0.0, 1.0], [-1.0, 1.0], [-3.0, -0.5, 0.0, 0.5, 3.0], list(range(-8, 8)))
    for (values, share), importance in itertools.product(
        itertools.product(sets, (0.02, 1.0)), (np.ones(2048, np.float32), rng.random(2048, np.float32))
    ):
        rows = rng.choice(np.array(values, dtype=np.float32), (20, 2048))
        assert_same_bytes(name, np.where(rng.random(rows.shape) < share, rows, np.float32(0)), importance)


@needs_ggml
@each_type
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 3), (5, 3), (7, 5), (2, 11), (9, 2), (70, 1)])
def test_any_number_of_rows_and_blocks(name: str, shape: tuple[int, int]) -> None:
    """Each row has its mean square, each column its importance, wherever they fall on the lanes."""
    rng = np.random.default_rng(25)
    rows = rng.standard_normal((shape[0], shape[1] * QTYPES[name].block)).astype(np.float32)
    rows *= np.float32(2) ** rng.integers(-8, 8, (shape[0], 1)).astype(np.float32)
    assert_same_bytes(name, rows, rng.random(rows.shape[1], np.float32))


@needs_ggml
@each_type
def test_more_rows_than_a_slab_and_rows_longer_than_one(name: str) -> None:
    rng = np.random.default_rng(26)
    wide = kernels.SLAB + 256
    for rows in (rng.standard_normal((2, wide)), rng.standard_normal((kernels.SLAB // 512 + 3, 512))):
        assert_same_bytes(name, rows.astype(np.float32), rng.random(rows.shape[1], np.float32))


@each_type
def test_bf16_rows_give_the_bytes_of_their_values(name: str) -> None:
    rng = np.random.default_rng(27)
    values, importance = rng.standard_normal((5, 512)).astype(np.float32), rng.random(512, np.float32)
    rows = (values.view(np.uint32) >> 16).astype(np.uint16)
    wide = (rows.astype(np.uint32) << 16).view(np.float32)
    memory = np.frombuffer(b"\0" + rows.tobytes(), dtype=np.uint8)[1:]
    odd = memory.view(rows.dtype).reshape(rows.shape)
    assert not odd.flags.aligned
    assert (ours(name, rows, importance) == ours(name, wide, importance)).all()
    assert (ours(name, odd, importance) == ours(name, wide, importance)).all()


@each_type
def test_importance_lowers_the_error_that_it_weighs(name: str) -> None:
    """The point of it all, seen through a reader of someone else's."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf library")
    rng = np.random.default_rng(28)
    rows = rng.standard_normal((64, 2048)).astype(np.float32)
    importance = rng.lognormal(sigma=2, size=2048).astype(np.float32)
    plain = np.empty((64, QTYPES[name].nbytes(2048)), dtype=np.uint8)
    quantize(
        QTYPES[name], rows, plain, np.ones(2048, np.float32) if QTYPES[name].importance == NEEDED else None
    )
    errors = []
    for data in (plain, ours(name, rows, importance)):
        values = gguf.dequantize(data, gguf.GGMLQuantizationType(QTYPES[name].ggml))
        errors.append(float((importance * (values - rows) ** 2).sum()))
    assert errors[1] < 0.9 * errors[0], errors


@each_type
def test_flags_are_those_of_the_plain_kernels(name: str) -> None:
    rows, importance = np.ones((3, 256), np.float32), np.ones(256, np.float32)
    out = np.empty((3, QTYPES[name].nbytes(256)), np.uint8)
    assert quantize(QTYPES[name], rows, out, importance) == 0
    rows[1, 100] = np.nan
    assert quantize(QTYPES[name], rows, out, importance) & kernels.NONFINITE
    rows[1, 100] = 3e7 * 128
    assert quantize(QTYPES[name], rows, out, importance) == kernels.OVERFLOW


@pytest.mark.parametrize("name", ["q8_0", "f16", "bf16", "f32"])
def test_other_types_ignore_it(name: str) -> None:
    rows = np.random.default_rng(29).standard_normal((2, 64)).astype(np.float32)
    plain = np.empty((2, QTYPES[name].nbytes(64)), np.uint8)
    quantize(QTYPES[name], rows, plain)
    assert (plain == ours(name, rows, np.arange(64, dtype=np.float32))).all()


@pytest.mark.parametrize(
    "importance", [np.ones(255, np.float32), np.ones((1, 256), np.float32), np.ones(256, np.float64)]
)
def test_a_matrix_of_another_shape_is_refused(importance: npt.NDArray[np.generic]) -> None:
    with pytest.raises(ValueError, match="importance"):
        ours("q4_k", np.ones((1, 256), np.float32), importance)  # type: ignore[arg-type]


@each_type
def test_threads_do_not_disturb_each_other(name: str) -> None:
    rng = np.random.default_rng(30)
    values, importance = rng.standard_normal((8, 20, 512)).astype(np.float32), rng.random(512, np.float32)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda rows: ours(name, rows, importance), values))
    for result, rows in zip(results, values, strict=True):
        assert (result == ours(name, rows, importance)).all()


def test_the_cache_knows_the_weighted_kernels_apart() -> None:
    kinds = [QTYPES["q4_0"]]
    kernels.warm(kinds, "f32", weighted=True)
    assert kernels.compiled(kinds, "f32", weighted=True)
    assert kernels._mark(kinds[0], "f32", True) != kernels._mark(kinds[0], "f32", False)
    assert kernels._mark(QTYPES["q8_0"], "f32", True) == kernels._mark(QTYPES["q8_0"], "f32", False)
