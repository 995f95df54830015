"""Rows held against plain rounding: what stands out is named, what every faithful quantizer does is not."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from converters.gguf.qtypes import QTYPES
from converters.gguf.rounding import nearest
from dsconvert.proof.nearest_rows import lost, most_loss, most_lost
from dsconvert.proof.row_faults import faults
from dsconvert.proof.row_sums import Matrix

Floats = npt.NDArray[np.float32]
TYPES = ("q8_0", "q4_0", "q4_k", "q3_k", "q2_k", "iq4_xs", "tq2_0")
NAME, ROW = "model.layers.0.mlp.down_proj.weight", 9


def weights(rows: int = 64, columns: int = 512, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def named(W: Floats, Q: Floats, N: Floats, kind: str) -> list[str]:
    return [f"{fault.where} {fault.why}" for fault in faults(Matrix().add(W, Q, N), NAME, kind, 64)]


def rounded(W: Floats, kind: str) -> Floats:
    N = nearest(W, QTYPES[kind])
    assert N is not None
    return N


@pytest.mark.parametrize("kind", TYPES)
def test_sums_are_those_of_plain_loops(kind: str) -> None:
    W = weights()
    N, Q = rounded(W, kind), W * np.float32(1.25)
    found = Matrix().add(W[:40], Q[:40], N[:40], labels=range(40))
    found.add(W[40:], Q[40:], N[40:], labels=range(40, 64))
    sums = found.against_nearest()
    assert sums is not None
    assert sums.labels.tolist() == list(range(64))
    for i in (0, 41, 63):
        energies = (Q[i] - W[i], N[i] - W[i], Q[i] - N[i], Q[i], N[i], W[i])
        wanted = [float(np.square(x.astype(np.float64)).sum()) for x in energies]
        got = (sums.noise, sums.plain, sums.apart, sums.length, sums.due, sums.signal)
        assert [float(part[i]) for part in got] == pytest.approx(wanted, rel=1e-4)
    assert lost(sums, kind) == pytest.approx(10 * math.log10(sums.noise.sum() / sums.plain.sum()))


@pytest.mark.parametrize("kind", TYPES)
def test_rows_that_are_the_rounded_ones_are_faithful_and_lose_nothing(kind: str) -> None:
    W = weights()
    N = rounded(W, kind)
    sums = Matrix().add(W, N, N).against_nearest()
    assert sums is not None
    assert lost(sums, kind) == 0.0
    assert named(W, N, N, kind) == []


@pytest.mark.parametrize("factor", [0.95, 1.05, 1.5])
@pytest.mark.parametrize("kind", TYPES)
def test_any_scaled_row_of_a_plain_matrix_is_named(kind: str, factor: float) -> None:
    W = weights()
    N = rounded(W, kind)
    Q = N.copy()
    Q[ROW] *= np.float32(factor)
    assert [text.split(" ")[1] for text in named(W, Q, N, kind)] == [str(ROW)]


@pytest.mark.parametrize("kind", TYPES)
def test_one_block_of_doubled_scale_in_a_plain_matrix_is_named(kind: str) -> None:
    W = weights()
    N = rounded(W, kind)
    Q, block = N.copy(), max(QTYPES[kind].block, 32)
    Q[ROW, block : 2 * block] *= 2
    assert [text.split(" ")[1] for text in named(W, Q, N, kind)] == [str(ROW)]


def test_ties_and_scales_of_another_compiler_are_no_fault() -> None:
    """Some rows have a value rounded the other way at a tie, which costs nothing."""
    W = weights()
    N = rounded(W, "q4_0")
    Q = N.copy()
    for row in (3, 17, 40):
        scale = np.abs(np.diff(np.unique(N[row, :32]))).min()
        W[row, 5] = N[row, 5] + scale / 2
        Q[row, 5] = N[row, 5] + scale
    assert named(W, Q, N, "q4_0") == []


@pytest.mark.parametrize("loss", [0.0, 2.5])
def test_a_row_that_loses_much_more_than_the_others_is_named(loss: float) -> None:
    """As error feedback leaves them: every row has more noise than plain rounding, one far more."""
    W = weights(columns=4096)
    N = rounded(W, "q4_0")
    more = np.random.default_rng(2).standard_normal(W.shape).astype(np.float32)
    Q = W + (N - W) * np.float32(10 ** (loss / 20)) + more * np.float32(0.01)
    assert named(W, Q, N, "gptq4") == []
    Q[ROW] = W[ROW] + (Q[ROW] - W[ROW]) * np.float32(2)
    (text,) = named(W, Q, N, "gptq4")
    assert text.startswith(f"row {ROW} loses ")
    assert f"the median row {max(loss, 0.1):.1f}" in text


def test_a_row_that_hangs_on_one_unimportant_value_may_lose_more() -> None:
    W = weights(columns=256)
    N = rounded(W, "q4_0")
    Q = N + np.random.default_rng(3).standard_normal(W.shape).astype(np.float32) * np.float32(0.01)
    W[ROW, 7] = 60.0
    N[ROW, 7], Q[ROW, 7] = 60.0, 58.5
    assert named(W, Q, N, "q4_0") == []


def test_without_rounding_no_row_is_held_against_it() -> None:
    W = weights()
    assert Matrix().add(W, W).against_nearest() is None


def test_types_that_store_values_as_given_lose_nothing_by_another_copy() -> None:
    """A float16 copy of a bfloat16 model, say, whose last bits are not these."""
    W = weights()
    sums = Matrix().add(W, W * np.float32(1.0001), W).against_nearest()
    assert sums is not None
    assert lost(sums, "bf16") is None
    assert named(W, W * np.float32(1.0001), W, "f16") == []


def test_error_feedback_may_lose_more_than_importance() -> None:
    assert most_lost("q2_k") == most_lost("iq4_xs") == 3.0
    assert most_lost("gptq2") == most_lost("exl2_3") == 5.0
    assert most_loss("q2_k") < most_loss("gptq4") == most_loss("exl2_3")


def test_error_feedback_may_move_a_row_farther_than_rounding_does() -> None:
    """A row of SmolLM2-135M in q6_k had 9.1 times the noise of the median row, and importance's .95."""
    W, rng = weights(), np.random.default_rng(4)
    E = 0.02 * rng.standard_normal(W.shape).astype(np.float32)
    E[ROW] *= 3.1
    matrix = Matrix().add(W, W + E)
    (found,) = faults(matrix, NAME, "q6_k", 64)
    assert (found.where, found.why[:16]) == (f"row {ROW}", "points elsewhere")
    assert faults(matrix, NAME, "q6_k", 64, fed=True) == ()
    E[ROW] *= 1.2
    assert len(faults(Matrix().add(W, W + E), NAME, "q6_k", 64, fed=True)) == 1
