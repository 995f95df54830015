"""MLX's grid in numbers: against the rule written out in Python, and the solver against plain rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from converters.mlx.affine import BITS, Affine, codes_of, grids, nearest
from converters.mlx.pack import pack
from dsconvert.errors import QuantizationError
from dsconvert.quantization.bit_stream import fields


def by_hand(group: list[float], bits: int) -> tuple[float, float, list[int]]:
    """Scale, bias and codes of one group, as `mx.quantize` documents and computes them, in float32."""
    f, top = np.float32, np.float32((1 << bits) - 1)
    low, high = f(min(group)), f(max(group))
    step = max(f((high - low) / top), f(1e-7))
    edge = low if abs(low) > abs(high) else high
    step = step if abs(low) > abs(high) else -step
    steps = np.rint(f(edge / step))
    scale, bias = (f(edge / steps), edge) if steps != 0 else (step, f(0))
    codes = [int(min(max(np.rint(f(f(w) - bias) / scale), 0), top)) for w in group]
    return float(scale), float(bias), codes


@pytest.mark.parametrize("bits", BITS)
def test_grids_and_codes_are_those_of_the_rule(bits: int) -> None:
    rng = np.random.default_rng(bits)
    rows = rng.standard_normal((8, 64)).astype(np.float32)
    rows[0], rows[1], rows[2], rows[3] = 0, 0.3, np.abs(rows[2]), -np.abs(rows[3])
    rows[4, :32] = 1e-9
    settings = Affine(bits, 32)
    scales, biases = grids(rows, settings)
    codes = codes_of(rows, scales, biases, settings)
    for n in range(8):
        for g in range(2):
            wanted = by_hand(rows[n, 32 * g : 32 * g + 32].tolist(), bits)
            assert (scales[n, g], biases[n, g], codes[n, 32 * g : 32 * g + 32].tolist()) == wanted


@pytest.mark.parametrize("bits", BITS)
def test_codes_lie_in_the_stream_without_a_gap(bits: int) -> None:
    rng, settings = np.random.default_rng(bits), Affine(bits, 32)
    codes = rng.integers(0, 1 << bits, (5, 96)).astype(np.uint8)
    numbers = rng.standard_normal((5, 3)).astype(np.float32)
    parts = pack(codes, numbers, numbers, settings, "bf16")
    assert parts["weight"].dtype == np.uint32
    for row, packed in zip(codes, parts["weight"], strict=True):
        whole = sum(int(code) << (bits * k) for k, code in enumerate(row))
        assert packed.tobytes() == whole.to_bytes(96 * bits // 8, "little")
    np.testing.assert_array_equal(fields(parts["weight"], bits, 96), codes)


def test_what_the_format_cannot_hold_is_refused() -> None:
    codes, numbers = np.full((1, 32), 4, np.uint8), np.ones((1, 1), np.float32)
    with pytest.raises(QuantizationError, match="the code 4"):
        pack(codes, numbers, numbers, Affine(2, 32), "f32")
    with pytest.raises(QuantizationError, match="too large for scales in f16"):
        pack(codes, numbers, numbers * 1e5, Affine(3, 32), "f16")


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "dtype"), [(2, "bf16"), (4, "bf16"), (8, "bf16"), (4, "f16")])
def test_error_feedback_loses_less_than_rounding_with_what_is_stored(
    bits: int, dtype: str, act_order: bool
) -> None:
    """Also at 8 bits in bf16, whose biases are a quarter of a step away from the ends of their groups."""
    torch = pytest.importorskip("torch")
    from converters.mlx.solver import SolverOptions, solve

    rng = np.random.default_rng(0)
    W = torch.from_numpy(rng.standard_normal((48, 128)).astype(np.float32))
    X = rng.standard_normal((512, 128)).astype(np.float32) @ rng.standard_normal((128, 128)).astype(
        np.float32
    )
    H = torch.from_numpy(2 * X.T @ X / len(X))
    settings = Affine(bits, 64)
    found = solve(W, H, SolverOptions(settings, dtype, act_order))
    assert found.fell_back is None
    error = (W - found.dequantized()).double()
    assert found.loss == pytest.approx(float(((error @ H.double()) * error).sum()), rel=1e-3)
    plain = (W - torch.from_numpy(nearest(W.numpy(), settings, dtype))).double()
    assert found.rtn_loss == pytest.approx(float(((plain @ H.double()) * plain).sum()), rel=1e-3)
    assert found.loss < 0.8 * found.rtn_loss
    kind = torch.bfloat16 if dtype == "bf16" else torch.half
    for part in (found.scales, found.biases):
        assert torch.equal(part, part.to(kind).float())


def test_what_a_hessian_cannot_solve_is_rounded_to_nearest_and_said() -> None:
    torch = pytest.importorskip("torch")
    from converters.mlx.solver import SolverOptions, solve

    W, options = torch.randn(8, 64), SolverOptions(Affine(4, 32), "f32")
    dead = solve(W, torch.zeros(64, 64), options)
    assert "ever active" in str(dead.fell_back)
    np.testing.assert_array_equal(dead.dequantized().numpy(), nearest(W.numpy(), options.settings, "f32"))
    assert "not finite" in str(solve(W, torch.full((64, 64), torch.nan), options).fell_back)
    with pytest.raises(QuantizationError, match="not finite"):
        solve(W * torch.inf, torch.eye(64), options)
    assert solve(W, torch.diag(torch.arange(64.0)), options).dead == 1


@pytest.mark.parametrize(("dtype", "act_order"), [("bf16", True), ("f16", False), ("f32", True)])
def test_refinement_ends_where_no_stored_number_beside_is_better(dtype: str, act_order: bool) -> None:
    """Of codes, scales and biases, each alone, by the loss with the damping, which it goes by."""
    torch = pytest.importorskip("torch")
    from converters.mlx.solver import SolverOptions, as_blocks, solve

    rng = np.random.default_rng(1)
    W = torch.from_numpy(rng.standard_normal((3, 64)).astype(np.float32))
    X = rng.standard_normal((256, 64)) @ rng.standard_normal((64, 64))
    H = torch.from_numpy((2 * X.T @ X / len(X)).astype(np.float32))
    walked, found = (solve(W, H, SolverOptions(Affine(3, 32), dtype, act_order, rounds=n)) for n in (0, 40))
    assert found.loss < 0.9 * walked.loss
    damped = H.double() + 0.05 * H.double().diagonal().mean() * torch.eye(64)

    def losses(codes: Any, scales: Any, biases: Any) -> Any:
        options = SolverOptions(Affine(3, 32), dtype)
        error = W.double() - as_blocks(codes, scales.double(), biases.double(), options).weights().T
        return ((error @ damped) * error).sum(1)

    least = losses(found.codes, found.scales, found.biases) * (1 - 1e-4)  # rounds end where no code moves
    kind = {"bf16": torch.bfloat16, "f16": torch.half, "f32": torch.float32}[dtype]
    bits = torch.int32 if dtype == "f32" else torch.int16
    for move in (-1, 1):
        for i in range(64):
            codes = found.codes.clone()
            codes[i] = (codes[i].int() + move).clamp(0, 7).byte()
            assert bool((losses(codes, found.scales, found.biases) >= least).all())
        for g in range(2):
            for part in range(2):
                numbers = [found.scales.clone(), found.biases.clone()]
                beside = numbers[part][g].to(kind).view(bits) + move
                numbers[part][g] = beside.view(kind).float()
                assert bool((losses(found.codes, *numbers) >= least).all())


def test_what_too_few_tokens_reached_is_rounded_and_says_so() -> None:
    torch = pytest.importorskip("torch")
    from converters.mlx.solver import SolverOptions, solve

    W, options = torch.randn(8, 64), SolverOptions(Affine(4, 32), "bf16")
    found = solve(W, torch.eye(64), options, few="only 3 tokens")
    assert found.fell_back == "only 3 tokens"
    np.testing.assert_array_equal(found.dequantized().numpy(), nearest(W.numpy(), options.settings, "bf16"))
    assert found.loss == pytest.approx(float((W - found.dequantized()).square().sum()), rel=1e-4)
