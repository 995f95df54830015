"""The bytes of every kernel against ggml's own quantizers, and the flags."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from pathlib import Path

import ggml_oracle
import numpy as np
import numpy.typing as npt
import pytest
from kernels_pieces import Rows, assert_same_bytes, ours

from converters.gguf import kernels
from converters.gguf.kernels import NONFINITE, OVERFLOW
from converters.gguf.qtypes import QTYPES

pytestmark = pytest.mark.skipif(not ggml_oracle.available(), reason=ggml_oracle.MISSING)

COLS = 512
SOURCES = ("bf16", "f32")
HAVE_K = importlib.util.find_spec("converters.gguf.kernels.kquants") is not None
K_QUANTS = tuple(name for name in QTYPES if name.endswith("_k"))
TYPES = [
    pytest.param(name, marks=pytest.mark.skipif(name in K_QUANTS and not HAVE_K, reason="no k-quant kernels"))
    for name in QTYPES
]
BLOCKS = [row for row in TYPES if QTYPES[str(row.values[0])].block > 1]


def stored(values: Rows, source: str) -> npt.NDArray[np.generic]:
    """`values` rounded toward zero to the source's format, in the type that kernels take."""
    if source == "bf16":
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return values


def adversarial() -> Rows:
    """Rows that break shortcuts; every value and every float16 scale is finite in every format."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(COLS).astype(np.float32)
    ties = np.tile(np.float32([1, -1]), COLS // 2)
    zeros = np.zeros(COLS, dtype=np.float32)
    outlier = normal * np.float32(1e-3)
    outlier[::32] = np.float32(60.0)
    late = np.where(np.arange(COLS) % 32 == 31, np.float32(-3), np.float32(0.01))
    rows = [
        zeros,
        -zeros,
        np.where(rng.random(COLS) < 0.5, zeros, -zeros),
        np.maximum(normal, 0),
        np.where(normal > 0.5, normal, -zeros),
        np.where(normal > 0.5, normal, np.where(rng.random(COLS) < 0.5, zeros, -zeros)),
        np.full(COLS, 0.375),
        np.full(COLS, -0.375),
        outlier,
        late,
        ties,
        -ties,
        np.roll(ties, 1) * np.abs(np.round(normal * 2)),
        np.abs(normal),
        -np.abs(normal),
        np.round(normal * 3),
        np.round(normal * 127) / 127,
        np.linspace(-1, 1, COLS),
        np.tile(np.arange(-16, 16), COLS // 32) / np.float32(2),
        (np.tile(np.arange(32), COLS // 32) - np.float32(0.5)) * np.float32(0.1),
        np.where(np.arange(COLS) // 32 % 2 == 0, normal, 0),
        normal * np.float32(1e-7),
        normal * np.float32(6e-8),
        normal * np.float32(1e-20),
        np.clip(normal, -2, 2) * np.float32(3e4),
        rng.integers(-3, 4, COLS) * np.float32(2.0**-24),
    ]
    return np.stack([np.asarray(row, dtype=np.float32) for row in rows])


def float32_only() -> Rows:
    """Rows whose values have no float16: denormals and the far ends of float32."""
    rng = np.random.default_rng(8)
    normal = rng.standard_normal(COLS).astype(np.float32)
    bits = rng.integers(0, 1 << 23, COLS).astype(np.uint32)
    signs = rng.integers(0, 2, COLS).astype(np.uint32) << 31
    tiny = np.float32(np.finfo(np.float32).tiny)
    rows = [
        (bits | signs).view(np.float32),
        (rng.integers(0, 4, COLS).astype(np.uint32) << 16 | signs).view(np.float32),
        normal * tiny,
        normal * tiny * np.float32(16),
        normal * np.float32(1e-36),
        normal * np.float32(1e30),
        np.where(np.arange(COLS) % 32 == 5, np.finfo(np.float32).max, normal).astype(np.float32),
    ]
    return np.stack([np.asarray(row, dtype=np.float32) for row in rows])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", TYPES)
def test_random_rows_at_twenty_scales(name: str, source: str) -> None:
    rng = np.random.default_rng(1)
    scales = np.float32(10) ** np.linspace(-7, 4, 20, dtype=np.float32)
    for scale in scales:
        normal = rng.standard_normal((3, COLS)).astype(np.float32)
        uniform = rng.uniform(-1, 1, (3, COLS)).astype(np.float32)
        laplace = rng.laplace(size=(3, COLS)).astype(np.float32)
        assert_same_bytes(name, stored(np.concatenate([normal, uniform, laplace]) * scale, source))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", TYPES)
def test_adversarial_rows(name: str, source: str) -> None:
    assert_same_bytes(name, stored(adversarial(), source))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", TYPES)
def test_denormals_and_the_far_ends_of_float32(name: str, source: str) -> None:
    rows = float32_only()
    if QTYPES[name].block == 256:
        rows = rows[:-1]  # with overflow inside the search, the result is flagged and not defined
    rows = ggml_oracle.bearable(name, rows)
    assert_same_bytes(name, stored(rows, source))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("rows", [1, 2, 65, 131])
def test_any_number_of_blocks(name: str, rows: int) -> None:
    cols = QTYPES[name].block
    values = np.random.default_rng(rows).standard_normal((rows, cols)).astype(np.float32)
    assert_same_bytes(name, stored(values, "bf16"))


@pytest.mark.parametrize("name", BLOCKS)
def test_more_values_than_a_slab(name: str) -> None:
    values = np.random.default_rng(3).standard_normal((17, 7936)).astype(np.float32)
    assert values.size > kernels.SLAB
    assert_same_bytes(name, stored(values, "bf16"))


@pytest.mark.parametrize("name", ["f16", "bf16", "f32"])
def test_casts_of_every_bit_pattern_class(name: str) -> None:
    """Every exponent with mantissas next to each rounding point, both signs."""
    mantissas = [0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7FFFFF]
    bits = np.array(
        [sign << 31 | e << 23 | m for sign in (0, 1) for e in range(255) for m in mantissas], dtype=np.uint32
    )
    assert_same_bytes(name, bits.view(np.float32)[None])


@pytest.mark.parametrize("source", SOURCES)
def test_a_cast_to_the_same_format_keeps_every_bit(source: str) -> None:
    rows = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)[None]
    rows = {
        "bf16": rows,
        "f32": (rows.astype(np.uint32) << 16 | 0x1234).view(np.float32),
    }[source]
    out, flags = ours(source, rows)
    assert flags == NONFINITE
    assert out.tobytes() == rows.tobytes()


def test_nan_becomes_quiet_as_in_ggml() -> None:
    nans = np.array([[0x7F800001, 0xFF800001, 0x7FC12345, 0xFFFFFFFF]], dtype=np.uint32).view(np.float32)
    for name in ("bf16", "f16"):
        out, flags = ours(name, nans)
        assert flags == NONFINITE
        assert (out == ggml_oracle.quantize(name, nans)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", TYPES)
def test_a_value_that_is_not_finite_is_flagged(name: str, source: str, value: float) -> None:
    rows = np.random.default_rng(5).standard_normal((3, COLS)).astype(np.float32)
    assert ours(name, stored(rows, source))[1] == 0
    for where in ((0, 0), (1, 77), (2, COLS - 1)):
        bad = rows.copy()
        bad[where] = value
        assert ours(name, stored(bad, source))[1] & NONFINITE, where


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", [row for row in TYPES if row.values[0] not in ("f32", "bf16", "mxfp4")])
def test_a_scale_beyond_float16_is_flagged(name: str, source: str) -> None:
    rows = np.random.default_rng(6).standard_normal((2, COLS)).astype(np.float32)
    rows[1] *= np.float32(1e12)
    assert ours(name, stored(rows, source))[1] == OVERFLOW


def test_the_largest_scale_that_fits_is_not_flagged() -> None:
    rows = np.zeros((1, 32), dtype=np.float32)
    rows[0, 3] = 65504 * 8
    assert ours("q4_0", rows)[1] == 0
    rows[0, 3] = 65520 * 8
    assert ours("q4_0", rows)[1] == OVERFLOW
    rows[0, 3] = 65504
    assert ours("f16", rows)[1] == 0
    rows[0, 3] = np.finfo(np.float32).max
    assert ours("bf16", rows)[1] == OVERFLOW


@pytest.mark.parametrize("name", BLOCKS)
def test_rows_may_be_unaligned_and_read_only(name: str) -> None:
    values = np.random.default_rng(9).standard_normal((2, COLS)).astype(np.float32)
    for source in SOURCES:
        rows = stored(values, source)
        memory = np.frombuffer(b"\0" + rows.tobytes(), dtype=np.uint8)
        odd = memory[1:].view(rows.dtype).reshape(rows.shape)
        assert not odd.flags.aligned
        assert not odd.flags.writeable
        assert (ours(name, odd)[0] == ours(name, rows)[0]).all()


def test_threads_give_the_same_bytes() -> None:
    values = stored(np.random.default_rng(10).standard_normal((64, COLS)).astype(np.float32), "bf16")
    want, _ = ours("q4_0", values)
    results: list[npt.NDArray[np.uint8]] = []
    threads = [
        threading.Thread(target=lambda: results.extend(ours("q4_0", values)[0] for _ in range(20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all((result == want).all() for result in results)


def test_no_rows_is_no_work() -> None:
    assert ours("q4_0", np.empty((0, 64), dtype=np.uint16))[1] == 0


@pytest.mark.parametrize(
    ("rows", "out"),
    [
        (np.zeros((2, 33), np.float32), np.zeros((2, 18), np.uint8)),
        (np.zeros((2, 64), np.float64), np.zeros((2, 36), np.uint8)),
        (np.zeros((2, 64), np.float32), np.zeros((2, 35), np.uint8)),
        (np.zeros((64, 2), np.float32).T, np.zeros((2, 36), np.uint8)),
        (np.zeros(64, np.float32), np.zeros(36, np.uint8)),
    ],
)
def test_arrays_that_break_the_contract_are_refused(rows: Rows, out: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=r"rows|out"):
        kernels.quantize(QTYPES["q4_0"], rows, out)


def run_python(code: str, home: Path, cache: Path) -> str:
    """What `code` prints in a fresh Python whose user has `home` and XDG_CACHE_HOME `cache`."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={"HOME": str(home), "XDG_CACHE_HOME": str(cache), "TMPDIR": str(home), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_does_not_import_numba(tmp_path: Path) -> None:
    code = "import sys, converters.gguf.kernels; print('numba' in sys.modules)"
    assert run_python(code, tmp_path, tmp_path / "cache") == "False"


def test_compiled_code_is_kept_in_the_users_cache_folder(tmp_path: Path) -> None:
    code = (
        "from converters.gguf import kernels\n"
        "from converters.gguf.qtypes import NEEDED, QTYPES\n"
        "from converters.gguf.kernels import widen\n"
        "kind = [QTYPES['bf16']]\n"
        "before = kernels.compiled(kind, 'f32')\n"
        "kernels.warm(kind, 'f32')\n"
        "hits = sum(widen.narrow_bf16.stats.cache_hits.values())\n"
        "print(before, kernels.compiled(kind, 'f32'), hits)\n"
    )
    package = Path(kernels.__file__).parent
    before = sorted(package.rglob("*.nbi"))
    assert run_python(code, tmp_path, tmp_path / "cache") == "False True 0"
    assert list((tmp_path / "cache" / "dsconvert").glob("kernels-*/**/*.nbi"))
    assert run_python(code, tmp_path, tmp_path / "cache") == "True True 1"
    assert sorted(package.rglob("*.nbi")) == before == []


@pytest.mark.parametrize("damage", [b"", b"\x80\x04 neither a pickle nor code"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: bytes) -> None:
    code = (
        "from converters.gguf import kernels\n"
        "from converters.gguf.qtypes import NEEDED, QTYPES\n"
        "kernels.warm([QTYPES['bf16']], 'bf16')\n"
        "print(kernels.compiled([QTYPES['bf16']], 'bf16'))\n"
    )
    assert run_python(code, tmp_path, tmp_path / "cache") == "True"
    files = [*(tmp_path / "cache").rglob("*.nbi"), *(tmp_path / "cache").rglob("*.nbc")]
    assert len(files) == 2
    for file in files:
        file.write_bytes(damage)
        assert run_python(code, tmp_path, tmp_path / "cache") == "True"
        assert file.read_bytes() != damage


def test_a_cache_folder_that_cannot_be_made_falls_back_to_a_temporary_one(tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    code = (
        "from converters.gguf.kernels import FOLDER\n"
        "from dsconvert import compile\n"
        "print(compile.cache_folder(FOLDER))\n"
    )
    folder = run_python(code, tmp_path, blocked)
    assert folder.startswith(str(tmp_path / "dsconvert-"))
    (tmp_path / Path(folder).relative_to(tmp_path).parts[0]).rename(tmp_path / "aside")
    (tmp_path / Path(folder).relative_to(tmp_path).parts[0]).write_text("in the way too")
    assert run_python(code, tmp_path, blocked) == "None"
