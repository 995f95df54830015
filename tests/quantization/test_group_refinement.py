"""GPTQ's groups after refinement: against every neighbour of every scale, zero point and code."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gptq_problems import ORDERS, direct_loss, problem

from dsconvert.quantization import group_refinement
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.gptq_solver import Solved, SolverOptions, solve
from dsconvert.quantization.group_refinement import Groups, as_blocks
from dsconvert.quantization.refinement import descend, refine, refine_scales
from dsconvert.quantization.static_blocks import Blocks

K, N, DAMP = 96, 5, 0.05
SCHEMES = [Scheme(2, 32, True), Scheme(3, 64, False), Scheme(2, -1, False), Scheme(4, 64, False)]


def damped(E: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """E H E^T of each output of E [N, K], H with the damping, in float64."""
    E, H = E.double(), H.double()
    return (E @ (H + DAMP * H.diagonal().mean() * torch.eye(len(H)))).mul_(E).sum(1)


def neighbours(blocks: Blocks) -> Iterator[Blocks]:
    """The blocks with one code of each output moved by one, or one scale, or one zero point."""
    for move in (-1, 1):
        for i in range(len(blocks.codes)):
            codes = blocks.codes.clone()
            codes[i] = (codes[i].int() + move).clamp(0, blocks.kind.top).byte()
            yield dataclasses.replace(blocks, codes=codes)
        for g in range(len(blocks.d)):
            scales, zeros = blocks.d.clone(), blocks.n.clone()
            halves = np.nextafter(scales[g].numpy().astype(np.float16), np.float16(move * np.inf))
            scales[g] = torch.from_numpy(halves.astype(np.float64))
            yield dataclasses.replace(blocks, d=scales, m=scales)
            zeros[g] = (zeros[g] + move).clamp(*blocks.kind.offsets)
            yield dataclasses.replace(blocks, n=zeros)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_end_of_refinement_has_no_better_neighbour(scheme: Scheme) -> None:
    W, H = problem(N, K, seed=scheme.bits)  # with groups of 64 the last one is short
    walked = solve(W, H, SolverOptions(scheme, damp=DAMP))
    none = torch.zeros(N, dtype=torch.float64)
    groups = Groups(walked.codes, walked.scales.double(), walked.zeros.double(), none)
    blocks, before = as_blocks(groups, scheme), torch.full((N,), torch.inf, dtype=torch.float64)
    assert torch.equal(blocks.weights().T, walked.dequantized().double())
    shift, columns = DAMP * float(H.diagonal().mean()), torch.arange(K)
    least = first = damped(W - blocks.weights().T, H)
    while bool((least < before).any()):
        blocks, _ = descend(W.T, H, shift, refine_scales(W.T, H, shift, blocks), columns)
        before, least = least, damped(W - blocks.weights().T, H)
        assert bool((least <= before * (1 + 1e-9)).all())
    assert bool((least < 0.97 * first).all())
    assert torch.equal(blocks.d, blocks.d.half().double())
    assert torch.equal(blocks.m, blocks.d)
    for other in neighbours(blocks):
        assert bool((damped(W - other.weights().T, H) >= least * (1 - 1e-6)).all())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("order", ORDERS, ids=["natural", "static", "dynamic"])
def test_each_round_lowers_the_loss(order: dict[str, bool], sym: bool) -> None:
    W, H = problem(64, 224, seed=8, dtype=torch.float32)
    options = SolverOptions(Scheme(2, 64, sym), **order)
    found = [solve(W, H, dataclasses.replace(options, rounds=rounds)) for rounds in (0, 1, 3)]
    sums = [damped(W - one.dequantized(), H) for one in found]
    for before, after in itertools.pairwise(sums):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert found[2].loss < found[1].loss < 0.9 * found[0].loss
    for one in found:
        assert one.loss == pytest.approx(direct_loss(W - one.dequantized(), H), rel=1e-3)
        assert torch.equal(one.g_idx, found[0].g_idx)
        assert torch.equal(one.zeros, found[0].zeros) or not sym
        assert int(one.zeros.min()) >= 1
        assert float(one.scales.min()) > 0


def test_an_output_that_is_no_better_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = problem(16, 128, seed=1, dtype=torch.float32)
    options = SolverOptions(Scheme(3, 32, False), act_order=True, rounds=1)
    walked, good = solve(W, H, dataclasses.replace(options, rounds=0)), solve(W, H, options)
    spoiled = [3, 7]
    others = [n for n in range(16) if n not in spoiled]

    def worse_in_two(*given: object) -> Blocks:
        found: Blocks = refine(*given)  # type: ignore[arg-type]
        found.codes[:, spoiled] = 0
        return found

    monkeypatch.setattr(group_refinement, "refine", worse_in_two)
    kept = solve(W, H, options)
    for name in ("codes", "scales", "zeros"):
        found, before, after = (getattr(one, name) for one in (kept, walked, good))
        assert torch.equal(found[:, spoiled], before[:, spoiled])
        assert torch.equal(found[:, others], after[:, others])
    assert good.loss < kept.loss < walked.loss


@pytest.mark.parametrize("sym", [True, False])
def test_inputs_without_activity_stay_without_weight(sym: bool) -> None:
    W, H = problem(16, 128, seed=2, dtype=torch.float32)
    dead = [0, 40, 127]
    H[dead] = 0
    H[:, dead] = 0
    found: Solved = solve(W, H, SolverOptions(Scheme(2, 32, sym), act_order=True, rounds=3))
    assert found.dead == 3
    assert not found.dequantized()[:, dead].any()
