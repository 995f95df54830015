"""The numpy decoder against transformers' own modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_llama import make, tokens
from variants import VARIANTS

from dsconvert.decoder import numpy_decoder
from dsconvert.decoder.numpy_config import numbers

torch = pytest.importorskip("torch")
from dsconvert.decoder import torch_decoder as st  # noqa: E402


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_are_those_of_transformers(variant: str) -> None:
    import transformers

    if variant == "new-rope-keys" and transformers.__version__ < "5":
        pytest.skip("needs transformers 5, whose config knows rope_parameters")
    _, source, config = make(**VARIANTS[variant])
    decoder = st.open_decoder(source, config, torch.device("cpu"), torch.float32)
    hidden = st.embed(st.read(decoder, st.EMBED), tokens(config, 3, 100), torch.float32)
    blocks, head = numpy_decoder.tensor_names(source, config)
    assert (blocks, head) == (decoder.blocks, decoder.head)
    read = numbers(config)
    np.testing.assert_allclose(read.angles, decoder.rotary.inv_freq.numpy(), rtol=1e-6)
    assert read.scale == pytest.approx(decoder.rotary.attention_scaling)
    for index, names in enumerate(blocks):
        expected = st.run_block(decoder, st.load_block(decoder, index), hidden)
        weights = {attribute: source.float32(name) for attribute, name in names.items()}
        found = numpy_decoder.block(numbers(config), weights, hidden.numpy())
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
        hidden = expected
    weight = source.float32(numpy_decoder.NORM)
    expected = st.normed(decoder, torch.tensor(weight), hidden)
    np.testing.assert_allclose(
        numpy_decoder.norm(hidden.numpy(), weight, config.norm_eps), expected, rtol=1e-5
    )


def test_a_shut_gate_is_no_warning() -> None:
    _, source, config = make()
    blocks, _ = numpy_decoder.tensor_names(source, config)
    weights = {attribute: source.float32(name) for attribute, name in blocks[0].items()}
    weights["mlp.gate_proj.weight"] = weights["mlp.gate_proj.weight"] * 1e6
    states = np.random.default_rng(0).standard_normal((1, 8, config.hidden_size), np.float32)
    assert np.isfinite(numpy_decoder.block(numbers(config), weights, states)).all()


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; import dsconvert.decoder.numpy_decoder, dsconvert.proof.numpy_compare; "
        "assert not sys.modules.keys() & {'torch'}"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ})
