"""The streamed decoder against transformers' whole model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_llama import Memory, make, tokens
from variants import VARIANTS

from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import CheckpointError, PlanError, UsageError
from dsconvert.models.config import ModelConfig

torch = pytest.importorskip("torch")


def run(source: Memory, config: ModelConfig, ids: Any, device: str = "cpu", dtype: str | None = None) -> Any:
    """All logits [n, length, vocab] through the streamed path."""
    place = st.pick_device(device)
    decoder = st.open_decoder(source, config, place, st.pick_dtype(dtype, place))
    hidden = st.embed(st.read(decoder, st.EMBED), ids, decoder.dtype)
    for index in range(config.layers):
        hidden = st.run_block(decoder, st.load_block(decoder, index), hidden)
    norm, head = (st.read(decoder, name).to(decoder.dtype) for name in (st.NORM, decoder.head))
    return st.logits(decoder, norm, head, hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_whole_model(variant: str) -> None:
    import transformers

    if variant == "new-rope-keys" and transformers.__version__ < "5":
        pytest.skip("needs transformers 5, whose config knows rope_parameters")
    model, source, config = make(**VARIANTS[variant])
    ids = tokens(config, 3, 100)
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits
    got = run(source, config, ids)
    assert expected.std() > 0.5  # logits that are not flat, so that an error would show
    assert torch.allclose(got, expected, rtol=1e-5, atol=2e-5)


def test_batches_of_windows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, source, config = make(num_key_value_heads=2)
    ids = tokens(config, 5, 40)
    whole = run(source, config, ids)
    monkeypatch.setitem(st.BATCH_TOKENS, "cpu", 80)
    assert torch.allclose(run(source, config, ids), whole, rtol=1e-5, atol=1e-5)


def test_rope_buffers_stay_float32_in_bfloat16() -> None:
    _, source, config = make()
    decoder = st.open_decoder(source, config, torch.device("cpu"), torch.bfloat16)
    assert decoder.rotary.inv_freq.dtype == torch.float32
    exact = 1.0 / 10000.0 ** (np.arange(0, 16, 2, dtype=np.float32) / 16)
    assert np.allclose(decoder.rotary.inv_freq.numpy(), exact, rtol=1e-6)


def test_bfloat16_agrees_with_the_whole_model_in_bfloat16() -> None:
    model, source, config = make()
    ids = tokens(config, 2, 64)
    inv_freq = model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16)
    model.model.rotary_emb.inv_freq = inv_freq  # a cast model would round its angles; ours does not
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.float()
    assert torch.equal(run(source, config, ids, dtype="bfloat16"), expected)


def test_observers_see_the_inputs_of_each_linear() -> None:
    """Applying the linear to what its observer saw gives the block's own output."""
    _, source, config = make(num_key_value_heads=2)
    decoder = st.open_decoder(source, config, torch.device("cpu"), torch.float32)
    hidden = st.embed(st.read(decoder, st.EMBED), tokens(config, 2, 20), torch.float32)
    block = st.load_block(decoder, 0)
    prefix = "model.layers.0."
    linears = [prefix + f"self_attn.{x}_proj.weight" for x in "qkvo"]
    linears += [prefix + f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    assert sorted(block.linears) == sorted(linears)
    seen: dict[str, list[Any]] = {name: [] for name in linears}
    out = st.run_block(decoder, block, hidden, {name: seen[name].append for name in linears})
    inputs = {name: torch.cat(parts) for name, parts in seen.items()}
    assert inputs[linears[0]].shape == (2, 20, 64)
    assert torch.equal(inputs[linears[0]], inputs[linears[2]])
    attention = hidden + inputs[linears[3]] @ torch.tensor(source.float32(linears[3])).T
    again = attention + inputs[linears[6]] @ torch.tensor(source.float32(linears[6])).T
    assert torch.allclose(again, out, atol=1e-5)
    st.run_block(decoder, block, hidden)
    assert len(seen[linears[0]]) == 1  # observers are gone after their run


def test_sources_are_checked_before_any_work() -> None:
    _, source, config = make()
    del source.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.up_proj"):
        st.open_decoder(source, config, torch.device("cpu"), torch.float32)


def test_a_class_without_a_table_is_refused() -> None:
    _, source, config = make()
    other = ModelConfig(**{**vars(config), "architecture": "OtherForCausalLM"})
    with pytest.raises(CheckpointError, match="OtherForCausalLM"):
        st.open_decoder(source, other, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("bad", [-1, 97])
def test_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    weight = torch.zeros(97, 4)
    with pytest.raises(UsageError, match="tokenizer is not this model's"):
        st.embed(weight, np.array([[1, bad]]), torch.float32)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:1", "cuda:99", ""])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        st.pick_device(name)


def test_devices_and_types() -> None:
    assert st.pick_device("cpu").type == "cpu"
    assert st.pick_dtype(None, torch.device("cpu")) == torch.float32
    assert st.pick_dtype(None, torch.device("cuda")) == torch.bfloat16
    with pytest.raises(UsageError, match="float32, bfloat16"):
        st.pick_dtype("fp8", torch.device("cpu"))


def test_importing_needs_no_torch() -> None:
    modules = (
        "dsconvert.decoder.torch_decoder, dsconvert.proof.compare, dsconvert.proof.figures, "
        "dsconvert.proof.thresholds"
    )
    code = f"import sys; import {modules}; assert not sys.modules.keys() & {{'torch', 'transformers'}}"
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], env={**os.environ}
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_runs_the_same_code() -> None:
    model, source, config = make(num_key_value_heads=2)
    ids = tokens(config, 3, 100)
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits
    assert torch.allclose(run(source, config, ids, "cuda", "float32").cpu(), expected, rtol=1e-3, atol=1e-3)
