"""Sensitivities: the streamed backward pass against one graph over the whole model, and against real KL."""

from __future__ import annotations

from typing import Any

import pytest
import random_llama
import torch

from dsconvert.decoder import block_walk, linear_inputs, sensitivity
from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import QuantizationError
from dsconvert.proof import compare

CPU = torch.device("cpu")


def opened(**keys: Any) -> tuple[st.Decoder, Any, Any]:
    model, source, config = random_llama.make(**keys)
    return st.open_decoder(source, config, CPU, torch.float32), random_llama.tokens(config, 3, 40), model


def naive(model: Any, windows: Any) -> dict[str, torch.Tensor]:
    """The mean squared gradient by each output, of the likeliest tokens, in one graph."""
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, args, y, name=name: outputs.__setitem__(f"{name}.weight", y))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    ]
    model.requires_grad_(True)
    with torch.enable_grad():
        logits = model(torch.from_numpy(windows)).logits
        total = logits.log_softmax(-1).amax(-1).sum()
        grads = torch.autograd.grad(total, list(outputs.values()))
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)
    return {n: g.square().mean((0, 1)) for n, g in zip(outputs, grads, strict=True)}


@pytest.mark.parametrize("keys", [{}, {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}])
def test_the_streamed_gradients_are_those_of_one_graph(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, windows, model = opened(**keys)
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
    monkeypatch.setattr(st, "LOGITS_AT_ONCE", 7 * decoder.config.vocab_size)  # the head in several pieces
    found = compare.result(sensitivity.sensitivities(decoder, windows))
    expected = naive(model, windows)
    assert found.keys() == expected.keys()
    for name in expected:
        if name != st.HEAD:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-9)
    with torch.no_grad():
        p = model(torch.from_numpy(windows)).logits.softmax(-1)
    torch.testing.assert_close(found[st.HEAD], (p * (1 - p)).mean((0, 1)), rtol=1e-4, atol=1e-9)


def test_they_foretell_the_divergence_that_a_small_change_makes() -> None:
    decoder, windows, model = opened()
    found = compare.result(sensitivity.sensitivities(decoder, windows))
    with torch.no_grad():
        base = model(torch.from_numpy(windows)).logits.log_softmax(-1)
    hidden = linear_inputs.embed(decoder, windows)
    ratios = []
    for index in range(decoder.config.layers):
        block = st.load_block(decoder, index)
        for group in block_walk.walk(decoder, block, hidden):
            for name in group.names:
                weight = model.get_parameter(name).detach()
                generator = torch.Generator().manual_seed(len(ratios))
                change = 0.01 * weight.std() * torch.randn(weight.shape, generator=generator)
                with torch.no_grad():
                    weight += change
                    other = model(torch.from_numpy(windows)).logits.log_softmax(-1)
                    weight -= change
                kld = float((base.exp() * (base - other)).sum(-1).mean())
                moved = ((change @ group.moment) * change).sum(1) / 2  # E[d_n^2]
                ratios.append(0.5 * float((found[name] * moved).sum()) / kld)
    assert len(ratios) == 7 * decoder.config.layers
    # A value projection's outputs are averaged over tokens; what its errors have in common there is missed.
    assert all(0.15 < ratio < 3 for ratio in ratios), ratios
    assert 0.6 < torch.tensor(ratios).log().mean().exp() < 1.6


def test_the_same_seed_gives_the_same_values() -> None:
    decoder, windows, _ = opened()
    first, again, other = (
        compare.result(sensitivity.sensitivities(decoder, windows, seed)) for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_broken_weight_is_named() -> None:
    decoder, windows, _ = opened()
    name = "model.layers.1.mlp.up_proj.weight"
    decoder.source.float32(name)[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"model\.layers\.1: gives states that are not finite"):
        compare.result(sensitivity.sensitivities(decoder, windows))
