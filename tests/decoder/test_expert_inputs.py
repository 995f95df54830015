"""The importance matrix of experts and latent attention: transformers' own inputs squared, by expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_experts
from click.testing import CliRunner

from converters.gguf.importance import quotients
from converters.gguf.importance_file import save
from converters.gguf.parse import open_gguf
from dsconvert.cli import cli
from dsconvert.decoder import importance
from dsconvert.decoder import torch_decoder as st
from dsconvert.models.config import load_config
from dsconvert.proof.compare import result

torch = pytest.importorskip("torch")
IDS = np.random.default_rng(3).integers(20, 1900, (2, 48))


@pytest.mark.parametrize("name", ["v2", "v32", "qwen3moe"])
def test_the_sums_are_those_of_the_squared_inputs(name: str, tmp_path: Path) -> None:
    from dsconvert.checkpoints.checkpoint import open_checkpoint

    folder = tiny_experts.checkpoint(tmp_path / "model", name)
    decoder = st.open_decoder(
        open_checkpoint(folder), load_config(folder), torch.device("cpu"), torch.float32
    )
    found = result(importance.measure_importance(decoder, IDS))
    seen, last = tiny_experts.given(tiny_experts.random_model(name), IDS), decoder.config.layers - 1
    at, block = f"model.layers.{last}.", f"blk.{last}."
    assert all(counts.any() for counts in found.counts.values()), "a tensor that the model has not"

    def same(tensor: str, x: Any) -> None:
        wanted = x.double().square().reshape(-1, *x.shape[-1:]).sum(0).numpy()
        np.testing.assert_allclose(found.sums[block + tensor], wanted[None], rtol=2e-4)

    same("attn_output.weight", seen[at + "self_attn.o_proj"][0][0])
    hidden, index, _ = seen[at + "mlp.experts"][0]
    counts = torch.bincount(index.flatten(), minlength=16).numpy()
    for kind in ("gate", "up", "down"):
        assert found.counts[f"{block}ffn_{kind}_exps.weight"].tolist() == counts.tolist()
    sums = found.sums[f"{block}ffn_up_exps.weight"]
    for expert in range(16):
        x = hidden[(index == expert).any(-1)].double()
        np.testing.assert_allclose(sums[expert], x.square().sum(0).numpy(), rtol=2e-4, atol=1e-6)
    if name != "qwen3moe":
        same("ffn_down_shexp.weight", seen[at + "mlp.shared_experts.down_proj"][0][0])
        same("attn_q_a.weight", seen[at + "self_attn.q_a_proj"][0][0])
        latents = seen[at + "self_attn.kv_b_proj"][0][0].double().square().reshape(-1, 256).sum(0).numpy()
        np.testing.assert_allclose(found.sums[f"{block}attn_v_b.weight"], [latents] * 4, rtol=2e-4)
        queries = seen[at + "self_attn.q_b_proj"][1].reshape(-1, 4, 96)[..., :64].double().square().sum(0)
        np.testing.assert_allclose(found.sums[f"{block}attn_k_b.weight"], queries.numpy(), rtol=2e-4)
    if name == "v32":
        for tensor, linear in (("attn_q_b", "wq_b"), ("attn_k", "wk"), ("proj", "weights_proj")):
            same(f"indexer.{tensor}.weight", seen[f"{at}self_attn.indexer.{linear}"][0][0])


def test_each_expert_is_rounded_by_its_own_importance(tmp_path: Path) -> None:
    """The bytes of a stack are those of its matrices quantized one by one."""
    from converters.gguf import kernels

    folder, name = tiny_experts.checkpoint(tmp_path / "model", "qwen3moe"), "blk.1.ffn_up_exps.weight"
    random = np.random.default_rng(0)
    counts = np.full((16, 1), 3, np.float32)
    counts[5] = 0
    sums = random.random((16, 256), np.float32) ** 4 * 9 * (counts > 0)
    entries = {f"{name}.in_sum2": sums, f"{name}.counts": counts}
    save(tmp_path / "i.gguf", {"general.type": ("string", "imatrix")}, entries, force=True)
    words = ["gguf", str(folder), "-q", "q4_k_s", "-o", str(tmp_path / "x.gguf"), "--verify", "off"]
    done = CliRunner().invoke(cli, [*words, "--imatrix", str(tmp_path / "i.gguf")])
    assert done.exit_code == 0, done.output
    assert "no token came to 1 of 16 matrices, number 5" in " ".join(done.output.split())
    values, _, untouched = quotients(entries)
    assert untouched == {name: (5,)}
    assert (values[name][5] == 1).all()
    tensor = open_gguf(tmp_path / "x.gguf").tensors[name]
    stored = np.array(tensor.blocks()).reshape(16, 256, -1)
    for expert in range(16):
        rows = tiny_experts.weights(folder)[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"].numpy()
        blocks = np.empty(stored[expert].shape, np.uint8)
        kernels.quantize(tensor.qtype, rows, blocks, values[name][expert])
        assert np.array_equal(blocks, stored[expert]), expert


def test_a_conversion_measures_on_the_way(tmp_path: Path) -> None:
    folder = tiny_experts.checkpoint(tmp_path / "model", "v3", num_hidden_layers=3)
    calib = ["--calib", "builtin", "--calib-samples", "4", "--calib-len", "64"]
    words = ["gguf", str(folder), "-q", "iq3_xxs", "-o", str(tmp_path / "x.gguf"), "--verify", "off", *calib]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    made = CliRunner().invoke(cli, ["imatrix", str(folder), "-o", str(tmp_path / "i.gguf"), *calib])
    assert made.exit_code == 0, made.output
    words = ["gguf", str(folder), "-q", "iq3_xxs", "-o", str(tmp_path / "y.gguf"), "--verify", "off"]
    again = CliRunner().invoke(cli, [*words, "--imatrix", str(tmp_path / "i.gguf")])
    assert again.exit_code == 0, again.output
    one, other = (open_gguf(tmp_path / f"{name}.gguf").tensors for name in "xy")
    assert {t.qtype.name for t in one.values()} >= {"iq3_xxs", "iq4_nl"}
    for name, tensor in one.items():
        assert np.array_equal(tensor.blocks(), other[name].blocks()), name
    judged = CliRunner().invoke(
        cli, ["verify", str(tmp_path / "x.gguf"), "--against", str(folder), "--windows", "1"]
    )
    assert judged.exit_code == 0, judged.output
