"""Error feedback on ggml's grids against its formula, one column at a time, and against every neighbour."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fed_problems import K, N, naive_walk, problem

from converters.gguf import feedback
from converters.gguf.block_fields import FIELDS, pack, unpack
from converters.gguf.qtypes import QTYPES, QType
from converters.gguf.rounding import dequantize
from dsconvert.quantization import refinement
from dsconvert.quantization.known_inputs import Inputs, measured
from dsconvert.quantization.refinement import descend, refine_scales
from dsconvert.quantization.static_blocks import Blocks, walk

F64 = npt.NDArray[np.float64]
TYPES = list(FIELDS)


def begun(qtype: QType, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, Inputs, Blocks]:
    """W^T, its inputs, and the blocks that the importance matrix gives."""
    W, H = (part.to(dtype) for part in problem())
    inputs = measured(H)
    rows = feedback.weighted(W.float().numpy(), qtype, inputs.importance)[0]
    return W.T.contiguous(), inputs, feedback.to_blocks(rows, qtype, W)


def losses(Wt: torch.Tensor, inputs: Inputs, blocks: Blocks) -> torch.Tensor:
    """E H E^T of each row, H with the damping."""
    assert inputs.factor is not None
    E = (Wt - blocks.weights()).double()
    H = inputs.H.double() + inputs.factor.shift * torch.eye(len(Wt))
    return (E * (H @ E)).sum(0)


@pytest.mark.parametrize("name", TYPES)
def test_blocks_are_numbers_and_numbers_are_blocks(name: str) -> None:
    qtype, W = QTYPES[name], problem()[0].float().numpy()
    random = np.random.default_rng(0).integers(0, 256, (N, qtype.nbytes(K)), np.uint8)
    for at in (FIELDS[name].d, FIELDS[name].m):
        if at is not None:  # no infinite scales
            random.reshape(-1, qtype.size)[:, at + 1] &= 0xBB
    for rows in (feedback.weighted(W, qtype, None)[0], random):
        assert np.array_equal(pack(unpack(rows, qtype), qtype), rows)
        blocks = feedback.to_blocks(rows, qtype, torch.zeros(()))
        np.testing.assert_array_equal(blocks.weights().T.numpy(), dequantize(rows, qtype))
        assert np.array_equal(feedback.from_blocks(blocks, qtype), rows)


@pytest.mark.parametrize("name", TYPES)
def test_the_walk_is_the_papers(name: str) -> None:
    Wt, inputs, start = begun(QTYPES[name])
    assert inputs.factor is not None
    H = inputs.H.numpy() + inputs.factor.shift * np.eye(K)
    expected = naive_walk(Wt.numpy(), H, inputs.columns.numpy(), start)
    found = walk(Wt, inputs.factor, inputs.columns, start)
    assert np.array_equal(found.numpy(), expected)
    assert (found != start.codes).double().mean() > 0.1


@pytest.mark.parametrize("name", TYPES)
def test_independent_inputs_leave_ggmls_bytes(name: str) -> None:
    """H = c I. Of the types whose codes ggml chooses for a scale before it is rounded, a few differ."""
    qtype, W = QTYPES[name], problem()[0].float()
    inputs = measured(0.5 * torch.eye(K))
    rows = feedback.weighted(W.numpy(), qtype, inputs.importance)[0]
    start = feedback.to_blocks(rows, qtype, W)
    assert inputs.factor is not None
    codes = walk(W.T.contiguous(), inputs.factor, inputs.columns, start)
    same = feedback.from_blocks(replace(start, codes=codes), qtype)
    assert (codes != start.codes).double().mean() < 0.005
    if name.startswith("q") and name.endswith("_k"):
        assert np.array_equal(same, rows)


@pytest.mark.parametrize("name", TYPES)
def test_the_end_of_descent_has_no_better_neighbour(name: str) -> None:
    Wt, inputs, start = begun(QTYPES[name])
    assert inputs.factor is not None
    blocks, moves = start, 1
    while moves:
        blocks, moves = descend(Wt, inputs.H, inputs.factor.shift, blocks, inputs.columns)
    least = losses(Wt, inputs, blocks)
    assert bool((least < losses(Wt, inputs, start)).all())
    for column in range(0, K, 3):
        for move in (-1, 1):
            codes = blocks.codes.clone()
            codes[column] = (codes[column].int() + move).clamp(0, blocks.kind.top).byte()
            assert bool((losses(Wt, inputs, replace(blocks, codes=codes)) >= least * (1 - 1e-6)).all())


def half_neighbours(values: torch.Tensor) -> list[torch.Tensor]:
    """The float16 below and above each value."""
    halves = values.numpy().astype(np.float16)
    return [
        torch.from_numpy(np.nextafter(halves, np.float16(to)).astype(np.float64)) for to in (-np.inf, np.inf)
    ]


@pytest.mark.parametrize("name", TYPES)
def test_the_end_of_refinement_has_no_better_neighbour(name: str) -> None:
    Wt, inputs, start = begun(QTYPES[name])
    assert inputs.factor is not None
    blocks, before = start, torch.full((N,), torch.inf, dtype=torch.float64)
    while bool((losses(Wt, inputs, blocks) < before).any()):
        before = losses(Wt, inputs, blocks)
        blocks = refine_scales(Wt, inputs.H, inputs.factor.shift, blocks)
    kind, least = blocks.kind, losses(Wt, inputs, blocks) * (1 - 1e-9)
    assert bool((least < losses(Wt, inputs, start)).any())
    for part, limits in (("s", kind.scales), ("n", kind.offsets)):
        numbers = getattr(blocks, part)
        for b in range(len(numbers) if limits[0] < limits[1] else 0):
            for move in (-1, 1):
                changed = numbers.clone()
                changed[b] = (changed[b] + move).clamp(*limits)
                assert bool((losses(Wt, inputs, replace(blocks, **{part: changed})) >= least).all())
    for part in ("d", "m") if kind.affine else ("d",):
        halves = getattr(blocks, part)
        assert torch.equal(halves, halves.half().double())
        for neighbours in half_neighbours(halves):
            for b in range(len(halves)):
                changed = halves.clone()
                changed[b] = neighbours[b]
                assert bool((losses(Wt, inputs, replace(blocks, **{part: changed})) >= least).all())


@pytest.mark.parametrize("name", TYPES)
def test_every_step_lowers_the_loss_of_every_row(name: str) -> None:
    """From the importance matrix's blocks to the walk, to better scales, to better codes: those of a file."""
    qtype = QTYPES[name]
    Wt, inputs, start = begun(qtype, torch.float32)
    assert inputs.factor is not None
    shift = inputs.factor.shift
    walked = replace(start, codes=walk(Wt, inputs.factor, inputs.columns, start))
    scaled = refine_scales(Wt, inputs.H, shift, walked)
    moved, _ = descend(Wt, inputs.H, shift, scaled, inputs.columns)
    steps = [losses(Wt, inputs, blocks) for blocks in (start, walked, scaled, moved)]
    for before, after in itertools.pairwise(steps):
        assert bool((after <= before * (1 + 1e-5)).all())
    sums = [float(step.sum()) for step in steps]
    assert sums[3] < 0.99 * sums[1]
    assert sums[1] < 0.9 * sums[0]
    solved = feedback.solve(Wt.T, inputs, qtype, 1, inputs.importance)
    assert np.array_equal(solved.rows, feedback.from_blocks(moved, qtype))
    assert not solved.kept
    assert solved.loss < 0.5 * solved.rtn_loss


def test_a_row_that_is_no_better_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    qtype, (W, H) = QTYPES["q4_k"], (part.float() for part in problem())
    inputs = measured(H)

    def worse_in_two_rows(Wt: torch.Tensor, inputs: Inputs, start: Blocks, rounds: int) -> Blocks:
        found = solve_blocks(Wt, inputs, start, rounds)
        found.codes[:, 3:5] = 0
        return found

    solve_blocks = feedback.refined
    good = feedback.solve(W, inputs, qtype, 0, inputs.importance)
    monkeypatch.setattr(feedback, "refined", worse_in_two_rows)
    found = feedback.solve(W, inputs, qtype, 0, inputs.importance)
    plain = feedback.weighted(W.numpy(), qtype, inputs.importance)[0]
    assert found.kept == 2
    assert np.array_equal(found.rows[3:5], plain[3:5])
    others = [n for n in range(N) if n not in (3, 4)]
    assert np.array_equal(found.rows[others], good.rows[others])
    assert good.loss < found.loss < found.rtn_loss


def test_a_row_whose_weights_are_far_worse_stays_though_its_outputs_are_better() -> None:
    """One input bears nearly all loss; errors of the others are 3 times as large in row 1, twice in row 2."""
    generator, columns = torch.Generator().manual_seed(1), 64
    W, signs = (
        torch.randn((4, columns), generator=generator),
        torch.randn((4, columns), generator=generator).sign(),
    )
    H = torch.eye(columns)
    H[0, 0] = 1e5
    times = torch.tensor([[1.0], [3.0], [2.0], [1.0]]).repeat(1, columns)
    times[1:3, 0] = 0
    qtype, inputs, error = QTYPES["q8_0"], measured(H), 0.1 * signs

    def stored(weights: torch.Tensor) -> npt.NDArray[np.uint8]:
        return feedback.weighted(weights.numpy(), qtype, None)[0]

    better, losses, plain_losses = feedback._compared(
        W.T, inputs, stored(W + times * error), stored(W + error), qtype
    )
    assert bool((losses[1:3] < 0.01 * plain_losses[1:3]).all())
    assert better.tolist() == [False, False, True, False]


def test_slabs_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    qtype, (W, H) = QTYPES["q3_k"], (part.float() for part in problem())
    inputs = measured(H)
    whole = feedback.solve(W, inputs, qtype, 1, None)
    monkeypatch.setattr(feedback, "SLAB", 10 * K)
    parts = feedback.solve(W, inputs, qtype, 1, None)
    assert np.array_equal(whole.rows, parts.rows)
    assert parts.loss == pytest.approx(whole.loss)
    assert parts.rtn_loss == pytest.approx(whole.rtn_loss)


def test_inputs_without_activity_or_factor_are_told() -> None:
    W, H = (part.float() for part in problem())
    H = H.clone()
    H[32:80] = 0
    H[:, 32:80] = 0
    inputs, qtype = measured(H), QTYPES["q4_k"]
    found = feedback.solve(W, inputs, qtype, 1, inputs.importance)
    assert found.dead == 48
    assert found.fell_back is None
    assert found.loss < 0.5 * found.rtn_loss
    assert np.isfinite(dequantize(found.rows, qtype)).all()
    for broken, why in ((torch.zeros_like(H), "ever active"), (-torch.eye(K), "not positive definite")):
        inputs = measured(broken)
        found = feedback.solve(W, inputs, qtype, 1, None)
        assert why in (found.fell_back or "")
        assert np.array_equal(found.rows, feedback.weighted(W.numpy(), qtype, None)[0])
        assert found.kept == N
        assert found.loss == found.rtn_loss


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "iq4_xs"])
def test_a_run_descends_as_torch_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Wt, inputs, start = begun(QTYPES[name])
    assert inputs.factor is not None
    shift = inputs.factor.shift
    compiled, moves = descend(Wt, inputs.H, shift, start, inputs.columns)
    monkeypatch.setattr(refinement, "_descend_run", refinement.descend_by_torch)
    by_torch, others = descend(Wt, inputs.H, shift, start, inputs.columns)
    assert moves == others > 0
    assert torch.equal(compiled.codes, by_torch.codes)
