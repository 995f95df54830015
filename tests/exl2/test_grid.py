"""EXL2's scale search against a naive one in numpy, the unpacker's scales, and exllamav2's own choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.exl2 import grid as grid_module
from converters.exl2.grid import LEAST, Grid, effective_scales, find_grid, from_codes, to_codes
from converters.exl2.pack import PARTS, Packed, dequantize, pack, stored_groups, unpack
from converters.exl2.pack import effective_scales as unpacked_scales
from converters.exl2.settings import Group
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.errors import QuantizationError

PEERS = Path(__file__).parents[3] / "shared" / "data" / "peers"
BITS = (2, 3, 4, 5, 6, 8)
CLOSE = 1e-5  # of an error: the search sums in float32
ONES = torch.ones(128)


def weights(rows: int, columns: int, size: float = 0.02, seed: int = 0) -> torch.Tensor:
    """Gaussian weights with a few outliers and columns of very different sizes."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)) * rng.uniform(0.05, 1, columns) * size
    w[rng.integers(0, rows, 3), rng.integers(0, columns, 3)] *= 4
    return torch.from_numpy(w.astype(np.float32))


def costs(rows: int, seed: int = 0) -> torch.Tensor:
    """What an error in each row costs: falling, as rows in order of activity do, over three decades."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.sort(np.exp(1.5 * rng.standard_normal(rows)))[::-1].astype(np.float32).copy())


def column_errors(w: Any, bits: int, cost: Any, codes: Any, largest: np.float16) -> Any:
    """The weighted error of each column in float64, with float16 scales."""
    part = np.float16(np.float32(largest) / np.float32(256))
    scale = (((codes.astype(np.float32) + 1) ** 2).astype(np.float16) * part).astype(np.float64)
    q = np.clip(np.round(w.astype(np.float64) / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return cost.astype(np.float64) @ (q * scale - w) ** 2


def naive_largest(w: Any, bits: int, multipliers: Any) -> list[np.float16]:
    """The largest scales that are tried: multiples of what the largest weight needs."""
    smax = max((np.abs(w).max() + np.float32(1e-12)) / np.float32((2**bits - 1) / 2), np.float32(LEAST))
    return [np.float16(max(smax * np.float32(p), np.float32(LEAST))) for p in multipliers]


def naive_tries(w: Any, bits: int, largest: np.float16) -> list[Any]:
    """The codes that are tried for each column: from four below what its own weights need to one above."""
    base = (np.abs(w).max(0) + np.float32(1e-12)) / np.float32((2**bits - 1) / 2)
    own = np.round(16 * np.sqrt(base / np.float32(largest)))
    return [np.clip(own + shift, 1, 16).astype(int) - 1 for shift in range(-4, 2)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns"), [(32, 1), (128, 40), (96, 33)])
@pytest.mark.parametrize("size", [0.02, 3e-4, 3e-5, 20.0])
def test_no_other_try_does_better(bits: int, rows: int, columns: int, size: float) -> None:
    given, weighed = weights(rows, columns, size, bits), costs(rows, bits)
    found = find_grid(given, bits, weighed)
    assert found.codes.dtype == torch.uint8
    assert found.largest.dtype == torch.float16
    w, cost = given.numpy(), weighed.numpy()
    tried = naive_largest(w, bits, [0.6 + 0.05 * i for i in range(13)])
    largest = np.float16(found.largest.item())
    assert largest in tried
    tries = naive_tries(w, bits, largest)
    assert (found.codes.numpy() == np.array(tries)).any(0).all()
    own = column_errors(w, bits, cost, found.codes.numpy(), largest)
    best = [
        np.min([column_errors(w, bits, cost, codes, one) for codes in naive_tries(w, bits, one)], 0)
        for one in tried
    ]
    assert (own <= best[tried.index(largest)] * (1 + CLOSE)).all()
    assert own.sum() <= min(each.sum() for each in best) * (1 + CLOSE)
    if tried[0] > 1e-4:  # else one float16 stands for many multipliers
        assert max(each.sum() for each in best) > own.sum() * (1 + CLOSE)


@pytest.mark.parametrize("bits", BITS)
def test_few_tries_come_near_the_best_of_all(bits: int) -> None:
    """All sixteen codes, and eight times as many largest scales over a wider range, give little more."""
    w, cost = weights(64, 96, seed=bits).numpy(), costs(64).numpy()
    found = find_grid(torch.from_numpy(w), bits, torch.from_numpy(cost))
    own = column_errors(w, bits, cost, found.codes.numpy(), np.float16(found.largest.item())).sum()
    every = np.broadcast_to(np.arange(16)[:, None], (16, 96))
    least = min(
        np.min([column_errors(w, bits, cost, codes, largest) for codes in every], 0).sum()
        for largest in naive_largest(w, bits, np.linspace(0.3, 1.5, 97))
    )
    assert own < least * 1.05


def test_an_error_is_put_where_it_costs_little() -> None:
    w = weights(128, 64)
    for bits in BITS:
        for row in (0, 77):
            cost = torch.ones(128)
            before = row_error(w, bits, cost, row)
            cost[row] = 1e4
            assert row_error(w, bits, cost, row) < before / 2
    assert_same(find_grid(w, 4, costs(128)), find_grid(w, 4, 1024 * costs(128)))


def row_error(w: torch.Tensor, bits: int, cost: torch.Tensor, row: int) -> float:
    scale = find_grid(w, bits, cost).scale
    return float((from_codes(to_codes(w, scale, bits), scale, bits) - w)[row].square().sum())


@pytest.mark.parametrize("chunk", [1, 96 * 7, 96 * 33 * 2, 1 << 30])
@pytest.mark.parametrize("columns", [33, 130])
def test_the_compiled_loop_sums_the_errors_that_torch_does(chunk: int, columns: int) -> None:
    """In pieces of any size."""
    w, cost = weights(96, columns), costs(96)
    scale = w.abs().amax(0) / torch.tensor([[0.7], [3.0], [9.0]])
    for bits in BITS:
        own = grid_module._errors(w, scale, cost, 1 << (bits - 1))
        torchs = grid_module.errors_by_torch(w, scale, cost, 1 << (bits - 1), chunk)
        assert own.dtype == torchs.dtype == torch.float64
        assert torch.allclose(own, torchs, rtol=CLOSE)


def assert_same(a: Grid, b: Grid) -> None:
    for part in ("codes", "largest", "scale"):
        assert torch.equal(getattr(a, part), getattr(b, part))


def test_scales_are_those_that_the_unpacker_computes() -> None:
    rng = np.random.default_rng(0)
    codes = np.arange(16, dtype=np.uint8)[None].repeat(600, 0)
    patterns = rng.integers(0, 0x7C00, 600).astype(np.uint16)  # every finite positive float16, subnormal too
    patterns[:40] = np.arange(40)
    largest = patterns.view(np.float16)
    with np.errstate(over="ignore"):
        expected = unpacked_scales(codes, largest)
    ours = effective_scales(torch.from_numpy(codes), torch.from_numpy(largest)[:, None])
    np.testing.assert_array_equal(ours.numpy(), expected)
    assert (ours[:40, 0].numpy() < 2**-14).all()


@pytest.mark.parametrize("size", [0.02, 1e-5, 2e-6])
def test_codes_mean_what_the_file_means(size: float) -> None:
    groups = [Group(bits, 64) for bits in sorted(BITS, reverse=True)]
    w = weights(64 * len(groups), 48, size)
    parts, codes, meant = w.split(64), [], []
    grids = [find_grid(part, group.bits, costs(64)) for part, group in zip(parts, groups, strict=True)]
    for part, group, grid in zip(parts, groups, grids, strict=True):
        codes.append(to_codes(part, grid.scale, group.bits))
        meant.append(from_codes(codes[-1], grid.scale, group.bits))
    packed = pack(
        torch.cat(codes).byte().numpy(),
        groups,
        torch.stack([grid.codes for grid in grids]).numpy(),
        torch.stack([grid.largest for grid in grids]).numpy(),
        np.arange(len(w)),
    )
    np.testing.assert_array_equal(dequantize(packed, 48).T, torch.cat(meant).numpy())


def test_codes_are_chosen_for_the_rounded_scale() -> None:
    """With subnormal parts the float16 scale is far from the real one; codes for the latter are worse."""
    for bits in BITS:
        w = weights(128, 64, 1.0, bits)
        w *= 2.4 * 2.0**-16 * (2**bits - 1) / 2 / float(w.abs().max())  # a part is 2 or 3 times the least
        grid = find_grid(w, bits, ONES)
        real = grid.largest.float() * ((grid.codes.float() + 1) / 16) ** 2
        assert float((real / grid.scale - 1).abs().max()) > 0.02
        errors = []
        for chosen in (grid.scale, real):
            codes = to_codes(w, chosen, bits)
            assert float(codes.min()) >= 0
            assert float(codes.max()) <= 2**bits - 1
            errors.append(float((from_codes(codes, grid.scale, bits) - w).square().sum()))
        assert errors[0] < errors[1]


@pytest.mark.parametrize("bits", BITS)
def test_a_group_of_zeros_stays_zero(bits: int) -> None:
    for w in (torch.zeros(32, 5), torch.full((32, 5), 1e-12)):
        grid = find_grid(w, bits, ONES[:32])
        codes = to_codes(w, grid.scale, bits)
        assert float(grid.scale.min()) > 0
        assert (codes == 1 << (bits - 1)).all()
        assert (from_codes(codes, grid.scale, bits) == 0).all()
    w = torch.zeros(32, 5)
    w[3, 2] = 0.5  # one column of zeros among others
    grid = find_grid(w, bits, ONES[:32])
    back = from_codes(to_codes(w, grid.scale, bits), grid.scale, bits)
    assert (back[:, [0, 1, 3, 4]] == 0).all()
    assert float(back[3, 2]) == pytest.approx(0.5, rel=0.3)


@pytest.mark.parametrize("bits", BITS)
def test_weights_out_of_reach_are_refused(bits: int) -> None:
    w = weights(32, 8, 0.02)
    for value in (float("nan"), float("inf"), -1e6):
        w[3, 3] = value
        with pytest.raises(QuantizationError, match="too large"):
            find_grid(w, bits, ONES[:32])
    w[3, 3] = 40000.0  # within float16: what it means has to be
    grid = find_grid(w, bits, ONES[:32])
    back = from_codes(torch.arange(2**bits)[:, None].expand(-1, 8), grid.scale, bits)
    assert bool(back.isfinite().all())


def test_the_same_weights_give_the_same_bytes() -> None:
    w = weights(128, 64)
    before = w.clone()
    assert_same(find_grid(w, 4, costs(128)), find_grid(w.clone(), 4, costs(128)))
    assert torch.equal(w, before)


@pytest.mark.cuda
def test_a_gpu_finds_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for bits in BITS:
        w = weights(128, 96, seed=bits)
        cost = costs(128)
        here, there = find_grid(w, bits, cost), find_grid(w.cuda(), bits, cost.cuda())
        assert torch.equal(here.codes, there.codes.cpu())
        assert torch.equal(here.scale, there.scale.cpu())


def test_no_scales_that_exllamav2_chose_do_better() -> None:
    """No error has reached a linear's first group: its scales are a search over the source's weights."""
    if not (PEERS / "exl2_4.2bpw").is_dir():
        pytest.skip("needs the peers' files, exl2_4.2bpw")
    from safetensors.numpy import load_file

    tensors = load_file(PEERS / "exl2_4.2bpw" / "output.safetensors")
    source = open_checkpoint(PEERS / "tiny256")
    shares = []
    linears = [name.removesuffix(".q_weight") for name in tensors if name.endswith(".q_weight")]
    for linear in linears:
        packed = Packed(*(tensors[f"{linear}.{part}"] for part in PARTS))
        bits, rows = stored_groups(packed)[0]
        order = np.argsort(packed.q_invperm)[:rows]
        w = np.ascontiguousarray(source.float32(f"{linear}.weight").T[order])
        cost = np.ones(rows, np.float32)
        found = find_grid(torch.from_numpy(w), bits, torch.from_numpy(cost))
        ours = column_errors(w, bits, cost, found.codes.numpy(), np.float16(found.largest.item())).sum()
        theirs = column_errors(w, bits, cost, unpack(packed)[1][0], packed.q_scale_max[0]).sum()
        assert ours < theirs
        # theirs is a good grid by the same reading of the file, not a random one
        assert theirs < 1.5 * ours
        shares.append(ours / theirs)
    assert np.mean(shares) < 0.95
    assert len(linears) == 29
