"""DeepSeekMoE-16B: Llama's attention, experts in all but the first layer; transformers has no such class."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsconvert.models.architecture import Keys, TorchClasses, check_full_attention, unwritable, usual_keys
from dsconvert.models.architectures.llama import LLAMA
from dsconvert.models.experts import GATINGS, SOFTMAX, Experts, mlp_rows
from dsconvert.models.tensor_table import DROP, Table
from dsconvert.models.values import Values

if TYPE_CHECKING:
    from dsconvert.models.config import ModelConfig

_ROWS = (*(row for row in LLAMA.table.rows if ".mlp." not in row.hf and not row.when), *mlp_rows())


def read_experts(get: Values) -> Experts:
    return Experts(
        count=get.size("n_routed_experts"),
        used=get.size("num_experts_per_tok"),
        size=get.size("moe_intermediate_size"),
        first=get.whole("first_k_dense_replace"),
        shared=get.whole("n_shared_experts"),
        normalised=get.flag("norm_topk_prob"),
    )


def check(get: Values) -> None:
    """Scores by softmax, no biases, and experts in every layer after the first dense ones."""
    if get.raw.get("scoring_func", SOFTMAX) != SOFTMAX:
        raise get.wrong("scoring_func", f"is {get.raw['scoring_func']!r:.40}, this class scores by softmax")
    if get.raw.get("moe_layer_freq", 1) != 1:
        raise get.wrong("moe_layer_freq", "is not 1, and here all layers after the dense ones have experts")
    if get.flag("attention_bias"):
        raise get.wrong("attention_bias", "is true, and this layout has no such biases")
    check_full_attention(get, "")


def torch_classes() -> TorchClasses:
    """Llama's layer with the experts of DeepSeek-V2, which are these: greedy choice by softmax, no scale."""
    from transformers import LlamaConfig
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
    from transformers.models.llama import modeling_llama as model

    def config(**keys: Any) -> Any:
        own = {"num_experts": keys["n_routed_experts"], "topk_method": "greedy", "routed_scaling_factor": 1.0}
        return LlamaConfig(**{**keys, **own, "n_group": None, "topk_group": None})

    def layer(config: Any, index: int) -> Any:
        made = model.LlamaDecoderLayer(config, index)
        if index >= config.first_k_dense_replace:
            made.mlp = DeepseekV2Moe(config)
        return made

    return TorchClasses(config, layer, model.LlamaRotaryEmbedding, model.LlamaRMSNorm)


def gguf_keys(config: ModelConfig) -> Keys:
    """Raises CheckpointError for weights that llama.cpp would not make sum up to 1."""
    experts = config.experts
    assert experts is not None  # this layout has them
    if experts.normalised:
        raise unwritable(
            "norm_topk_prob true", "llama.cpp leaves the weights of this architecture as they are"
        )
    return {
        **usual_keys(config),
        "rope.dimension_count": ("uint32", config.head_dim),
        "vocab_size": ("uint32", config.vocab_size),
        "expert_count": ("uint32", experts.count),
        "expert_used_count": ("uint32", experts.used),
        "expert_gating_func": ("uint32", GATINGS[SOFTMAX]),
        "leading_dense_block_count": ("uint32", experts.first),
        "expert_feed_forward_length": ("uint32", experts.size),
        "expert_weights_scale": ("float32", 1.0),
        "expert_shared_count": ("uint32", experts.shared),
    }


def library_keys(config: ModelConfig) -> dict[str, Any]:
    experts = config.experts
    assert experts is not None  # this layout has them
    return {
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.used,
        "moe_intermediate_size": experts.size,
        "first_k_dense_replace": experts.first,
        "n_shared_experts": experts.shared,
        "norm_topk_prob": experts.normalised,
    }


ARCHITECTURES = (
    replace(
        LLAMA,
        hf_class="DeepseekForCausalLM",
        model_type="deepseek",
        gguf="deepseek",
        table=Table(_ROWS, DROP),
        # Of the class that comes with the model; published files state all of them.
        defaults={
            **{key: value for key, value in LLAMA.defaults.items() if key != "mlp_bias"},
            "vocab_size": 102400,
            "num_hidden_layers": 30,
            "moe_intermediate_size": 1407,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
        },
        check=check,
        torch_classes=torch_classes,
        gguf_keys=gguf_keys,
        words=r"\w*deepseek(Moe)?(ForCausalLM|Model|LMHeadModel)",
        experts=read_experts,
        library_keys=library_keys,
        derived=lambda config: {},
        wide_values=lambda config: False,
        numpy_block=False,
    ),
)
