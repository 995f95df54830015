"""Experts and latent attention: their numbers, the rows of their tensors, their keys in a GGUF file.

Layers from `first` on have a router and many small MLPs in place of one (DeepSeekMoE, Dai et al., 2024).
Latent attention projects keys and values from one small vector per token (MLA, DeepSeek-V2, 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsconvert.models.tensor_table import HEADS, HEADS_TURNED, Row

SOFTMAX, SIGMOID = "softmax", "sigmoid"
GATINGS = {SOFTMAX: 1, SIGMOID: 2}  # llama.cpp's expert_gating_func
_L = "model.layers.{i}."
_A = _L + "self_attn."
RUNTIME_BEST = 2  # as Experts.best, of llama.cpp, whatever a file says
GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Experts:
    """The experts of a model's layers from `first` on: `count` of them, of which a token goes to `used`.

    `size` is the width of each, `shared` times that of the MLP that every token goes to. Scores are of the
    `gating`, with a `bias` on the choice alone or none; of `groups` only the best `groups_used` count. The
    weights of the chosen are made to sum up to 1 where `normalised`, then multiplied by `scale`.
    """

    count: int
    used: int
    size: int
    first: int = 0
    shared: int = 0
    gating: str = SOFTMAX
    bias: bool = False
    groups: int = 1
    groups_used: int = 1
    normalised: bool = False
    scale: float = 1.0

    @property
    def best(self) -> int:
        """Of how many of its best scores the sum is by which a group is taken: V3's two, V2's one."""
        return 2 if self.gating == SIGMOID else 1

    @property
    def chosen_otherwise(self) -> bool:
        """Whether llama.cpp takes groups by another rule than the model."""
        return self.groups > 1 and self.best != RUNTIME_BEST


@dataclass(frozen=True)
class Indexer:
    """What chooses the keys that a query attends to (DeepSeek sparse attention, V3.2, 2025): those of the
    `top` best scores, which `heads` of `size` values give.
    """

    heads: int
    size: int
    top: int

    @property
    def dims(self) -> dict[str, int]:
        """The sizes by the letters that table shapes use."""
        return {"iq": self.heads * self.size, "ik": self.size, "iw": self.heads}


@dataclass(frozen=True)
class Latent:
    """The widths of latent attention: of its vectors for queries (None without) and for keys and values, and
    of each head: `nope` values without RoPE, `rope` with it, `value` of what is summed. Without an `indexer`
    a query attends to all keys before it.
    """

    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int
    indexer: Indexer | None = None

    def dims(self, heads: int) -> dict[str, int]:
        """The sizes by the letters that table shapes use."""
        return {
            "q": heads * (self.nope + self.rope),
            "kv": self.kv_rank + self.rope,
            "hv": heads * self.value,
            "kvb": heads * (self.nope + self.value),
            "ql": self.q_rank or 0,
            "kl": self.kv_rank,
            "nope": self.nope,
            "value": self.value,
            **(self.indexer.dims if self.indexer else {}),
        }


_PARTS = ("nope", "value")
LATENT_ATTENTION = (
    Row(_A + "q_proj.weight", "blk.{i}.attn_q.weight", "qkv", ("q", "d"), when="whole_queries"),
    Row(_A + "q_a_proj.weight", "blk.{i}.attn_q_a.weight", "qkv", ("ql", "d"), when="latent_queries"),
    Row(_A + "q_a_layernorm.weight", "blk.{i}.attn_q_a_norm.weight", "norm", ("ql",), when="latent_queries"),
    Row(_A + "q_b_proj.weight", "blk.{i}.attn_q_b.weight", "latent", ("q", "ql"), when="latent_queries"),
    Row(_A + "kv_a_proj_with_mqa.weight", "blk.{i}.attn_kv_a_mqa.weight", "qkv", ("kv", "d")),
    Row(_A + "kv_a_layernorm.weight", "blk.{i}.attn_kv_a_norm.weight", "norm", ("kl",)),
    Row(
        _A + "kv_b_proj.weight", "blk.{i}.attn_k_b.weight", "latent", ("heads", "kl", "nope"), HEADS_TURNED,
        part=(0, _PARTS), source=("kvb", "kl"),
    ),
    Row(
        _A + "kv_b_proj.weight", "blk.{i}.attn_v_b.weight", "latent", ("heads", "value", "kl"), HEADS,
        part=(1, _PARTS), source=("kvb", "kl"),
    ),
    Row(_A + "o_proj.weight", "blk.{i}.attn_output.weight", "o", ("d", "hv")),
)  # fmt: skip


def mlp_rows(
    at: str = "mlp.",
    router: str = "mlp.gate",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Row, ...]:
    """The rows of the layers' MLPs: plain before the first layer of experts, then router and experts.

    `at` and `names` are how the checkpoint calls the experts' matrices: gate, up, down.
    """
    return (
        *_gated(_L + "mlp.", GATED, "", "ff", depth="dense"),
        Row(_L + f"{router}.weight", "blk.{i}.ffn_gate_inp.weight", "router", ("E", "d"), first="dense"),
        Row(
            _L + f"{router}.e_score_correction_bias", "blk.{i}.exp_probs_b.bias", "router", ("E",),
            first="dense", when="router_bias",
        ),
        *_gated(_L + at + "experts.{e}.", names, "_exps", "m", first="dense"),
        *_gated(_L + at + "shared_experts.", GATED, "_shexp", "sm", first="dense", when="shared_experts"),
    )  # fmt: skip


def _gated(hf: str, names: tuple[str, str, str], end: str, size: str, **more: Any) -> tuple[Row, ...]:
    """Gate, up and down of one MLP, or of a stack of experts."""
    stack = ("E",) if end == "_exps" else ()
    return tuple(
        Row(
            f"{hf}{name}.weight",
            f"blk.{{i}}.ffn_{kind}{end}.weight",
            "down" if kind == "down" else "gate_up",
            (*stack, "d", size) if kind == "down" else (*stack, size, "d"),
            **more,
        )
        for name, kind in zip(names, ("gate", "up", "down"), strict=True)
    )


def expert_dims(experts: Experts | None, layers: int) -> dict[str, int]:
    """The sizes by the letters that table shapes use; "dense" counts the layers before the experts."""
    if experts is None:
        return {}
    return {
        "dense": min(experts.first, layers),
        "E": experts.count,
        "m": experts.size,
        "sm": experts.shared * experts.size,
    }


def expert_keys(experts: Experts) -> dict[str, tuple[str, Any]]:
    """The keys of a GGUF file that say how tokens go to experts, as llama.cpp's converter writes them."""
    keys: dict[str, tuple[str, Any]] = {
        "expert_count": ("uint32", experts.count),
        "expert_used_count": ("uint32", experts.used),
        "expert_group_count": ("uint32", experts.groups),
        "expert_group_used_count": ("uint32", experts.groups_used),
        "expert_gating_func": ("uint32", GATINGS[experts.gating]),
        "leading_dense_block_count": ("uint32", experts.first),
        "expert_feed_forward_length": ("uint32", experts.size),
        "expert_shared_count": ("uint32", experts.shared),
        "expert_weights_scale": ("float32", experts.scale),
    }
    return keys | ({"expert_weights_norm": ("bool", True)} if experts.normalised else {})


def latent_keys(latent: Latent) -> dict[str, tuple[str, Any]]:
    """The keys of a GGUF file on latent attention, which llama.cpp runs with one head of keys and values."""
    sizes = {
        "attention.head_count_kv": 1,
        "attention.key_length": latent.kv_rank + latent.rope,
        "attention.value_length": latent.kv_rank,
        **({} if latent.q_rank is None else {"attention.q_lora_rank": latent.q_rank}),
        "attention.kv_lora_rank": latent.kv_rank,
        "attention.key_length_mla": latent.nope + latent.rope,
        "attention.value_length_mla": latent.value,
        "rope.dimension_count": latent.rope,
        **({} if latent.indexer is None else indexer_keys(latent.indexer)),
    }
    return {key: ("uint32", size) for key, size in sizes.items()}


def indexer_keys(indexer: Indexer) -> dict[str, int]:
    """The keys of a GGUF file on the indexer of sparse attention."""
    return {
        "attention.indexer.head_count": indexer.heads,
        "attention.indexer.key_length": indexer.size,
        "attention.indexer.top_k": indexer.top,
    }
