"""Sensitivities: the streamed backward pass against one graph over the whole model, and against real KL."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_llama
import tiny_experts
import torch

from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.decoder import block_walk, linear_inputs, sensitivity
from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import QuantizationError
from dsconvert.models.config import load_config
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
        outputs = {name: y for name, y in outputs.items() if y.requires_grad and y.numel()}
        grads = torch.autograd.grad(total, list(outputs.values()))
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)
    return {n: g.square().flatten(0, -2).mean(0) for n, g in zip(outputs, grads, strict=True)}


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


class PlainExperts(torch.nn.Module):
    """transformers' fused experts as three linears each."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        for number, (inner, down) in enumerate(zip(fused.gate_up_proj, fused.down_proj, strict=True)):
            parts = (*inner.detach().chunk(2), down.detach())
            names = ("gate_proj", "up_proj", "down_proj")
            self.add_module(
                str(number), torch.nn.ModuleDict(dict(zip(names, map(linear, parts), strict=True)))
            )

    def forward(self, hidden: Any, index: Any, weights: Any) -> Any:
        total = torch.zeros_like(hidden)
        for number, expert in self.named_children():
            token, place = torch.where(index == int(number))
            gate, up, down = expert.children()
            part = down(torch.nn.functional.silu(gate(hidden[token])) * up(hidden[token]))
            total = total.index_add(0, token, part * weights[token, place, None])
        return total


def linear(weight: Any) -> Any:
    found = torch.nn.Linear(*weight.shape[::-1], bias=False)
    found.weight = torch.nn.Parameter(weight.clone())
    return found


SMALL = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}


@pytest.mark.parametrize("name", ["v2", "v3", "v32", "qwen3moe", "mixtral"])
def test_gradients_go_through_experts_and_latent_attention(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one graph in float64 over transformers' model; each expert is read once on the way back."""
    sizes = SMALL | ({"kv_lora_rank": 32, "first_k_dense_replace": 1} if name in tiny_experts.MLA else {})
    folder = tiny_experts.checkpoint(tmp_path / "model", name, **sizes)
    decoder = st.open_decoder(open_checkpoint(folder), load_config(folder), CPU, torch.float32)
    windows = np.random.default_rng(3).integers(20, 1900, (3, 24))
    model = tiny_experts.random_model(name, **sizes)
    with torch.no_grad():
        before = model(torch.from_numpy(windows)).logits
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = PlainExperts(layer.mlp.experts)
    with torch.no_grad():
        torch.testing.assert_close(model(torch.from_numpy(windows)).logits, before)
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
    monkeypatch.setattr(st, "BATCH_TOKENS", {"cpu": 24})
    read, plain = Counter[str](), st.read_as_run
    monkeypatch.setattr(st, "read_as_run", lambda d, n: read.update([n]) or plain(d, n))
    found = compare.result(sensitivity.sensitivities(decoder, windows))
    routed = {one for layer in decoder.experts for names in layer for one in names}
    assert {read[one] for one in routed} <= {0, 2}  # on the way forth, and back
    expected = naive(model.double(), windows)
    for one, values in found.items():
        if one != st.HEAD and (one not in routed or read[one]):
            wanted = expected[in_transformers(one)].float()
            torch.testing.assert_close(values, wanted, rtol=1e-2, atol=1e-3 * float(wanted.max()))
    seen = {in_transformers(one) for one in found if one not in routed or read[one]}
    assert seen == {one for one in expected if "indexer" not in one}


def in_transformers(name: str) -> str:
    """What transformers calls Mixtral's matrices, which are as their paper names them on disk."""
    for end, other in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        name = name.replace(f".{end}.", f".{other}.")
    return name.replace(".block_sparse_moe.", ".mlp.")


def test_an_expert_without_tokens_has_the_mean_of_the_others(tmp_path: Path) -> None:
    folder = tiny_experts.checkpoint(tmp_path / "model", "qwen3moe", **SMALL)
    decoder = st.open_decoder(open_checkpoint(folder), load_config(folder), CPU, torch.float32)
    found = compare.result(sensitivity.sensitivities(decoder, np.array([[5, 900]])))  # of 16 experts 4 to 8
    for layer in decoder.experts:
        for names in zip(*layer, strict=True):
            values = torch.stack([found[name] for name in names])
            alike = [int((values == one).all(1).sum()) for one in values]
            assert max(alike) >= 8
            assert alike.count(1) >= 4
