"""The walk through blocks with experts and latent attention, against transformers' own inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_experts

from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.decoder import block_walk, linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.models.config import load_config

torch = pytest.importorskip("torch")
IDS = np.random.default_rng(3).integers(20, 1900, (2, 48))
SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "moe_intermediate_size": 64, "kv_lora_rank": 64}


def moment(x: Any) -> Any:
    x = x.double().reshape(-1, x.shape[-1])
    return 2 / max(1, len(x)) * x.T @ x


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", ["v2", "v3", "qwen3moe"])
def test_experts_are_measured_on_the_tokens_that_come_to_them(name: str, fixed: bool, tmp_path: Path) -> None:
    sizes = {**SMALL, **({"first_k_dense_replace": 1} if name != "qwen3moe" else {})}
    folder = tiny_experts.checkpoint(tmp_path / "model", name, **sizes)
    decoder = st.open_decoder(
        open_checkpoint(folder), load_config(folder), torch.device("cpu"), torch.float32
    )
    seen = tiny_experts.given(tiny_experts.random_model(name, **sizes), IDS)
    walked, advanced = (linear_inputs.embed(decoder, IDS) for _ in range(2))
    for index in range(2):
        at = f"model.layers.{index}."
        block, names = st.load_block(decoder, index), []
        for group in block_walk.walk(decoder, block, walked, fixed=fixed):
            names.append(group.names)
            first = group.names[0].removesuffix(".weight")
            if group.moment.ndim == 3:  # of the queries, without what RoPE turns
                names.pop()
                x = seen[f"{at}self_attn.q_b_proj"][1].reshape(-1, 4, 96)[..., :64]
                for head, own in enumerate(group.moment):
                    wanted = moment(x[:, head])
                    assert float((own - wanted).abs().max()) < 2e-4 * float(wanted.abs().max())
                continue
            if not group.routed:
                x = seen[first][0][0]
                assert group.rows == IDS.size
            elif len(group.names) == 2:
                hidden, chosen, _ = seen[f"{at}mlp.experts"][0]
                x = hidden[(chosen == int(first.split(".")[5])).any(-1)]
                assert group.rows == len(x)
                gate, up = (decoder.source.float32(name) for name in group.names)
                inner = torch.nn.functional.silu(x @ torch.from_numpy(gate).T) * (x @ torch.from_numpy(up).T)
            else:
                x = inner
            wanted = moment(x)
            scale = max(float(wanted.abs().max()), 1e-6)
            assert float((group.moment - wanted).abs().max()) < 2e-4 * scale, first
        assert names == block_walk.groups(decoder, index)
        block_walk.advance(decoder, block, advanced)
        assert torch.equal(walked, advanced)
        plain = seen[at.rstrip(".")][1]
        np.testing.assert_allclose(walked, plain[0] if isinstance(plain, tuple) else plain, atol=2e-4)


def test_a_weight_of_an_expert_that_is_replaced_counts_from_there_on(tmp_path: Path) -> None:
    folder = tiny_experts.checkpoint(tmp_path / "model", "qwen3moe", **SMALL)
    decoder = st.open_decoder(
        open_checkpoint(folder), load_config(folder), torch.device("cpu"), torch.float32
    )
    hidden = linear_inputs.embed(decoder, IDS)
    before, expert = hidden.clone(), decoder.experts[0][3]
    block_walk.advance(decoder, st.load_block(decoder, 0), before)
    down = {}
    for group in block_walk.walk(decoder, st.load_block(decoder, 0), hidden):
        if expert[0] in group.names:
            group.linears[expert[1]].weight.data.zero_()
        if group.routed and len(group.names) == 1:
            down[group.names[0]] = float(group.moment.abs().max())
    assert [name for name, most in down.items() if most == 0] == [expert[2]]
    came = (hidden != before).any(-1)
    assert 0 < int(came.sum()) < came.numel()
