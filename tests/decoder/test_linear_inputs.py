"""Capture: the moments of a linear's inputs against transformers' own forward, and the walk's states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import random_llama
import torch
from decoders import CPU, inputs_of, opened

from dsconvert.decoder import block_walk, linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import QuantizationError, UsageError

GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("keys", [{}, {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}])
def test_moments_are_those_of_the_inputs_that_transformers_gives(
    keys: dict[str, Any], diagonal: bool
) -> None:
    model, decoder, windows = opened(**keys)
    expected = inputs_of(model, windows)
    hidden = linear_inputs.embed(decoder, windows)
    for index in range(decoder.config.layers):
        block = st.load_block(decoder, index)
        names = []
        for group in block_walk.walk(decoder, block, hidden, diagonal):
            names.append(
                [n.removeprefix(f"model.layers.{index}.").removesuffix(".weight") for n in group.names]
            )
            for name in group.names:
                x = expected[name]
                exact = 2 / len(x) * x.T @ x
                exact = exact.diagonal() if diagonal else exact
                assert group.rows == len(x)
                assert group.moment.dtype == torch.float32
                assert float((group.moment - exact).abs().max() / exact.abs().max()) < 1e-5
        assert names == GROUPS


def only(windows: int) -> Callable[..., int]:
    """Memory for what a linear is given in so many windows."""
    return lambda decoder, all_windows, length, inputs: min(windows, all_windows)


@pytest.mark.parametrize(("kept", "fixed"), [(0, False), (3, False), (99, False), (0, True)])
def test_the_walk_and_advance_give_the_states_of_a_plain_run(
    kept: int, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_inputs, "room", only(kept))
    monkeypatch.setitem(st.BATCH_TOKENS, "cpu", 40)  # several batches, of which some are kept
    _, decoder, windows = opened(num_key_value_heads=2)
    assert len(windows) > 3
    walked, advanced = linear_inputs.embed(decoder, windows), linear_inputs.embed(decoder, windows)
    plain = walked.clone()
    for index in range(decoder.config.layers):
        block = st.load_block(decoder, index)
        assert len(list(block_walk.walk(decoder, block, walked, fixed=fixed))) == 4
        block_walk.advance(decoder, block, advanced)
        plain = st.run_block(decoder, block, plain)
        assert torch.equal(walked, advanced)
        assert torch.equal(walked, plain)


@pytest.mark.parametrize("diagonal", [False, True])
def test_moments_are_the_same_where_no_memory_is_left(
    diagonal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, decoder, windows = opened(num_key_value_heads=2)
    found = []
    for kept, fixed in ((99, False), (3, False), (0, False), (0, True)):
        monkeypatch.setattr(linear_inputs, "room", only(kept))
        hidden = linear_inputs.embed(decoder, windows)
        walk = block_walk.walk(decoder, st.load_block(decoder, 0), hidden, diagonal, fixed)
        found.append([group.moment for group in walk])
    for first, *others in zip(*found, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_every_linear_runs_once_where_none_is_replaced() -> None:
    _, decoder, windows = opened()
    block, runs = st.load_block(decoder, 0), dict[str, int]()

    def seen(name: str) -> Callable[..., None]:
        return lambda module, given, result: runs.update({name: runs.get(name, 0) + len(result)})

    for name, linear in block.linears.items():
        linear.register_forward_hook(seen(name))
    list(block_walk.walk(decoder, block, linear_inputs.embed(decoder, windows), fixed=True))
    assert runs == dict.fromkeys(block.linears, len(windows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_are_summed_in_float32(dtype: torch.dtype) -> None:
    X = torch.randn(512, 300, generator=torch.Generator().manual_seed(2)).to(dtype)
    moment = torch.zeros(300, 300)
    linear_inputs._take_in(moment, X, 1.0)
    exact = (2 / len(X) * X.double().T @ X.double()).tril()
    assert float((moment.tril() - exact).abs().max() / exact.abs().max()) < 1e-6


def test_a_moment_of_more_than_a_few_columns_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lower half is computed, a few rows at once, and the upper one copied."""
    monkeypatch.setattr(linear_inputs, "WIDTH", 7)
    _, decoder, _ = opened()
    hidden = torch.randn(4, 16, 40, generator=torch.Generator().manual_seed(1))
    moment = linear_inputs.measured(decoder, hidden, {"x": torch.nn.Linear(40, 1)}, lambda x: x).moment
    x = hidden.flatten(0, 1).double()
    assert torch.equal(moment, moment.T)
    assert torch.allclose(moment.double(), 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_replaced_counts_from_there_on() -> None:
    _, decoder, windows = opened()
    block = st.load_block(decoder, 0)
    moments = [g.moment for g in block_walk.walk(decoder, block, linear_inputs.embed(decoder, windows))]
    block = st.load_block(decoder, 0)
    for at, group in enumerate(block_walk.walk(decoder, block, linear_inputs.embed(decoder, windows))):
        assert torch.equal(group.moment, moments[at]) == (at <= 1)
        if group.names[0].endswith("o_proj.weight"):  # what comes before o does not see it
            linear = block.linears[group.names[0]]
            linear.weight.data = linear.weight.data * 1.5  # type: ignore[operator, union-attr]


def test_the_mean_of_many_batches_is_exact_enough() -> None:
    """Over 2^18 rows a product that is added to the mean term by term is off by 2e-4."""
    _, decoder, _ = opened()
    generator = torch.Generator().manual_seed(0)
    hidden = 3e4 + torch.randn(256, 1024, 8, generator=generator)
    group = linear_inputs.measured(decoder, hidden, {"x": torch.nn.Linear(8, 1)}, lambda x: x)
    x = hidden.flatten(0, 1).double()
    exact = 2 / len(x) * x.T @ x
    assert group.rows == 1 << 18
    assert float(((group.moment - exact) / exact).abs().max()) < 3e-6


def test_inputs_that_are_not_finite_are_refused_by_name() -> None:
    _, source, config = random_llama.make()
    broken = source.float32("model.layers.1.mlp.up_proj.weight").copy()
    broken[3, 4] = np.nan
    decoder = st.open_decoder(
        source.changed(model__layers__1__mlp__up_proj__weight=broken), config, CPU, torch.float32
    )
    hidden = linear_inputs.embed(decoder, random_llama.tokens(config, 2, 32))
    list(block_walk.walk(decoder, st.load_block(decoder, 0), hidden))
    with pytest.raises(
        QuantizationError, match=r"layers.1.mlp.down_proj.weight: is given inputs that are no"
    ):
        list(block_walk.walk(decoder, st.load_block(decoder, 1), hidden))


def test_ids_outside_the_table_are_refused() -> None:
    _, decoder, windows = opened()
    with pytest.raises(UsageError, match="outside the 97 rows"):
        linear_inputs.embed(decoder, windows + 97)
