"""DeepSeek V3.2, V3.2-Exp, V3.2-Speciale: V3, and an indexer that chooses the keys of each query."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsconvert.models.architecture import Keys, TorchClasses, unwritable
from dsconvert.models.architectures import deepseek2
from dsconvert.models.experts import Indexer, Latent
from dsconvert.models.tensor_table import DROP, Row, Table
from dsconvert.models.values import Values

if TYPE_CHECKING:
    from dsconvert.models.config import ModelConfig

ATTENTION = "indexed_attention"  # of all layers, in transformers' words
DENSE, SPARSE = "dense", "sparse"
LEAST = 64  # values that llama.cpp's Hadamard transform of the indexer's heads has at least
_I, _STORED = "model.layers.{i}.self_attn.indexer.", "blk.{i}.indexer."
INDEXER = (
    Row(_I + "wq_b.weight", _STORED + "attn_q_b.weight", "latent", ("iq", "ql")),
    Row(_I + "wk.weight", _STORED + "attn_k.weight", "latent", ("ik", "d")),
    Row(_I + "k_norm.weight", _STORED + "k_norm.weight", "norm", ("ik",)),
    Row(_I + "k_norm.bias", _STORED + "k_norm.bias", "norm", ("ik",)),
    Row(_I + "weights_proj.weight", _STORED + "proj.weight", "weigher", ("iw", "d")),
)
_V3 = {key: value for key, value in deepseek2.V3_DEFAULTS.items() if key != "rope_interleave"}
DEFAULTS = {
    **_V3,
    "max_position_embeddings": 163840,
    "mlp_bias": False,
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_n_heads": 64,
}


def read_latent(get: Values) -> Latent:
    indexer = Indexer(*map(get.size, ("index_n_heads", "index_head_dim", "index_topk")))
    found = replace(deepseek2.read_latent(get), indexer=indexer)
    if found.q_rank is None:
        raise get.wrong("q_lora_rank", "is null, and the indexer's queries are made of that small vector")
    if indexer.size < found.rope:
        why = f"is {indexer.size}, less than the {found.rope} values that RoPE turns (qk_rope_head_dim)"
        raise get.wrong("index_head_dim", why)
    return found


def check(get: Values) -> None:
    """As V3, and every layer has an indexer."""
    types = get.raw.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(kind != ATTENTION for kind in types)):
        raise get.wrong("layer_types", f"names other layers than {ATTENTION}, the only ones of this layout")
    if get.raw.get("indexer_types") is not None:
        raise get.wrong("indexer_types", "gives layers an indexer or none, and here each has its own")
    deepseek2.check_v3(get.over({"layer_types": None}))
    layers, first = get.size("num_hidden_layers"), get.whole("first_k_dense_replace")
    kinds = [DENSE] * min(first, layers) + [SPARSE] * max(layers - first, 0)
    if get.raw.get("mlp_layer_types") not in (None, kinds):
        why = f"is not {first} times {DENSE}, then {SPARSE}, as first_k_dense_replace says of {layers} layers"
        raise get.wrong("mlp_layer_types", why)


def torch_classes() -> TorchClasses:
    from transformers import DeepseekV32Config
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as model

    return TorchClasses(
        DeepseekV32Config,
        model.DeepseekV32DecoderLayer,
        model.DeepseekV32RotaryEmbedding,
        model.DeepseekV32RMSNorm,
    )


def indexer_of(config: ModelConfig) -> Indexer:
    assert config.latent is not None  # this layout has both
    assert config.latent.indexer is not None
    return config.latent.indexer


def library_keys(config: ModelConfig) -> dict[str, Any]:
    indexer = indexer_of(config)
    return {
        **deepseek2.library_keys(config),
        "index_n_heads": indexer.heads,
        "index_head_dim": indexer.size,
        "index_topk": indexer.top,
    }


def gguf_keys(config: ModelConfig) -> Keys:
    """Raises CheckpointError for what llama.cpp would run as another model, or not load."""
    size = indexer_of(config).size
    if size < LEAST or size & (size - 1):
        raise unwritable(
            f"index_head_dim {size}",
            f"llama.cpp turns the indexer's heads by a Hadamard matrix of a power of two, {LEAST} or more",
        )
    return deepseek2.gguf_keys(config)


ARCHITECTURES = (
    replace(
        deepseek2.V3,
        mlx=False,  # it was not tried
        hf_class="DeepseekV32ForCausalLM",
        model_type="deepseek_v32",
        gguf="deepseek32",
        table=Table((*deepseek2.ROWS, *INDEXER), DROP),
        defaults=DEFAULTS,
        check=check,
        torch_classes=torch_classes,
        gguf_keys=gguf_keys,
        words=r"\w*deepseek_?v3[._]?2(ForCausalLM|Model|LMHeadModel)",
        latent=read_latent,
        library_keys=library_keys,
        stored_as=None,
    ),
)
