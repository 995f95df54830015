"""What rounds latent attention as llama.cpp does, which never makes the keys and values of heads.

It multiplies queries by the keys' half of kv_b and attends to the latent vectors themselves; what comes of
that is multiplied by the values' half (MLA with absorption, DeepSeek-V2, 2024). So the parts of queries that
RoPE does not turn are rounded, head by head, and the mixed latent vectors; those of each token never are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.expert_inputs import queries_of
from dsconvert.decoder.experts import Observer
from dsconvert.models.architectures import find_architecture
from dsconvert.models.tensor_table import HEADS_TURNED, expand

if TYPE_CHECKING:
    import torch

    from dsconvert.proof.runtime_rounding import Rounding


def absorb(
    decoder: st.Decoder, block: st.Block, keys: Rounding, values: Rounding, output: Rounding
) -> Observer:
    """Let a block attend to latent vectors; returns what its output linear is given in place of its input.

    `keys` rounds what is multiplied by the keys' half of kv_b, `values` by the other one, `output` by the
    output linear.
    """
    import torch

    latent, heads = decoder.config.latent, decoder.config.heads
    assert latent is not None  # only then is there a kv_b
    attention = block.module.self_attn
    both = attention.kv_b_proj.weight.view(heads, latent.nope + latent.value, latent.kv_rank)
    of_keys, of_values = both[:, : latent.nope], both[:, latent.nope :]

    def expand_latents(x: torch.Tensor) -> torch.Tensor:
        """Vectors [..., kv_rank] as the keys of all heads, each followed by the vector itself."""
        own = torch.einsum("...c,hnc->...hn", x, of_keys)
        return torch.cat((own, x[..., None, :].expand(*own.shape[:-1], -1)), -1).flatten(-2)

    def round_queries(module: Any, args: Any, found: torch.Tensor) -> torch.Tensor:
        each = found.view(*found.shape[:-1], heads, -1)
        return torch.cat((keys(each[..., : latent.nope]), each[..., latent.nope :]), -1).flatten(-2)

    def mixed(x: torch.Tensor) -> torch.Tensor:
        """Mixed latent vectors [..., heads * kv_rank] as the output linear's input."""
        each = values(x.view(*x.shape[:-1], heads, latent.kv_rank))
        return output(torch.einsum("...hc,hvc->...hv", each, of_values).flatten(-2))

    del attention.kv_b_proj
    attention.kv_b_proj, attention.v_head_dim = expand_latents, latent.kv_rank
    block.linears[queries_of(block)].register_forward_hook(round_queries)
    return mixed


def halves(decoder: st.Decoder, index: int, types: Mapping[str, str]) -> tuple[str, str]:
    """The types of the halves of a block's kv_b; `types` are those of a file's tensors by its own names."""
    found = {}
    for spec in expand(find_architecture(decoder.config.architecture).table, decoder.config):
        if spec.layer == index and spec.hf.endswith("kv_b_proj.weight"):
            usual = decoder.source.dtype(spec.hf)
            found[spec.row.transform is HEADS_TURNED] = types.get(spec.gguf, usual)
    return found[True], found[False]
