"""The importance matrix: its sums are transformers' own inputs squared, its file is llama.cpp's format."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import random_llama
import tiny
import torch
from click.testing import CliRunner
from decoders import CPU, inputs_of, opened
from gguf import GGUFReader

from dsconvert.cli import cli
from dsconvert.decoder import importance
from dsconvert.decoder import torch_decoder as st
from dsconvert.models.architectures import find_architecture
from dsconvert.models.tensor_table import expand
from dsconvert.proof.compare import result


def test_the_sums_are_those_of_the_squared_inputs() -> None:
    model, decoder, windows = opened(num_key_value_heads=2)
    found = result(importance.measure_importance(decoder, windows))
    expected = inputs_of(model, windows)
    expected.pop("lm_head.weight")
    table = find_architecture(decoder.config.architecture).table
    named = {spec.hf: spec.gguf for spec in expand(table, decoder.config)}
    assert found.sums.keys() == found.counts.keys() == {named[name] for name in expected}
    for name, x in expected.items():
        assert found.counts[named[name]].tolist() == [windows.size]
        np.testing.assert_allclose(found.sums[named[name]], x.square().sum(0).numpy()[None], rtol=1e-4)


def test_tensors_have_the_names_of_a_gguf_model() -> None:
    _, source, config = random_llama.make()
    decoder = st.open_decoder(source, config, CPU, torch.float32)
    found = importance.tensors(
        result(importance.measure_importance(decoder, random_llama.tokens(config, 2, 16)))
    )
    assert list(found) == sorted(found, key=lambda name: (name.rsplit(".", 1)[0], name.endswith("counts")))
    assert found["blk.0.ffn_down.weight.in_sum2"].shape == (1, config.intermediate_size)
    assert found["blk.2.attn_q.weight.counts"].tolist() == [[32.0]]
    assert len(found) == 2 * 7 * config.layers


def test_the_file_is_read_by_the_gguf_package(tmp_path: Path) -> None:
    model, out = tiny.tiny_checkpoint(tmp_path / "model"), tmp_path / "imatrix.gguf"
    command = ["imatrix", str(model), "--calib", "builtin", "--calib-samples", "3", "--calib-len", "64"]
    done = CliRunner().invoke(cli, [*command, "--outfile", str(out), "--quiet"])
    assert done.exit_code == 0, done.output
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = GGUFReader(out)
    keys = {name: field.contents() for name, field in file.fields.items()}
    assert keys["general.type"] == "imatrix"
    assert keys["imatrix.chunk_count"] == 3
    assert keys["imatrix.chunk_size"] == 64
    assert keys["imatrix.datasets"][0].startswith("builtin sha256:")
    tensors = {tensor.name: tensor.data for tensor in file.tensors}
    assert len(tensors) == 2 * 7 * 2
    sums = tensors["blk.1.ffn_up.weight.in_sum2"]
    assert sums.dtype == np.float32
    assert (sums > 0).all()
    assert tensors["blk.1.ffn_up.weight.counts"].ravel().tolist() == [192.0]
    assert (sums == tensors["blk.1.ffn_gate.weight.in_sum2"]).all()
    again = CliRunner().invoke(cli, [*command, "--outfile", str(out)])
    assert again.exit_code == 2
    assert "exists already" in again.output


@pytest.mark.parametrize("suffix", ["in_sum2", "counts"])
def test_every_linear_has_both(suffix: str) -> None:
    name = "blk.0.ffn_up.weight"
    found = importance.tensors(importance.Importance({name: np.ones((1, 4), "f4")}, {name: np.ones(1, "f4")}))
    assert f"{name}.{suffix}" in found
