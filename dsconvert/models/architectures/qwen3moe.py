"""Qwen3 with experts (Qwen3-30B-A3B, 235B-A22B): Qwen3's attention, and experts in every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsconvert.models.architecture import Keys, TorchClasses, unwritable
from dsconvert.models.architectures import qwen3
from dsconvert.models.experts import Experts, mlp_rows
from dsconvert.models.tensor_table import DROP, Table
from dsconvert.models.values import Values

if TYPE_CHECKING:
    from dsconvert.models.config import ModelConfig

QWEN3 = qwen3.ARCHITECTURES[0]
_ROWS = (*(row for row in QWEN3.table.rows if ".mlp." not in row.hf), *mlp_rows())


def read_experts(get: Values) -> Experts:
    """transformers saves their number under another name than the published files have."""
    key = "num_experts" if "num_experts" in get.raw else "num_local_experts"
    return Experts(
        count=get.size(key, get.defaults["num_experts"]),
        used=get.size("num_experts_per_tok"),
        size=get.size("moe_intermediate_size"),
        normalised=get.flag("norm_topk_prob"),
    )


def check(get: Values) -> None:
    """Experts in every layer; else as Qwen3."""
    if get.stated("mlp_only_layers"):
        raise get.wrong("mlp_only_layers", "names layers, and here all have experts")
    if get.size("decoder_sparse_step") != 1:
        raise get.wrong("decoder_sparse_step", "is not 1, and here all layers have experts")
    qwen3.check(get)


def torch_classes() -> TorchClasses:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe import modeling_qwen3_moe as model

    parts = (model.Qwen3MoeDecoderLayer, model.Qwen3MoeRotaryEmbedding, model.Qwen3MoeRMSNorm)
    return TorchClasses(Qwen3MoeConfig, *parts)


def gguf_keys(config: ModelConfig) -> Keys:
    """Raises CheckpointError for weights that llama.cpp would make sum up to 1."""
    experts = config.experts
    assert experts is not None  # this layout has them
    if not experts.normalised:
        raise unwritable("norm_topk_prob false", "llama.cpp makes the weights of a token's experts sum to 1")
    return {
        **QWEN3.gguf_keys(config),
        "expert_count": ("uint32", experts.count),
        "expert_used_count": ("uint32", experts.used),
        "expert_feed_forward_length": ("uint32", experts.size),
    }


def library_keys(config: ModelConfig) -> dict[str, Any]:
    experts = config.experts
    assert experts is not None  # this layout has them
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.used,
        "moe_intermediate_size": experts.size,
        "norm_topk_prob": experts.normalised,
    }


_OWN = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
}
_NONE = ("head_dim", "max_window_layers")
ARCHITECTURES = (
    replace(
        QWEN3,
        mlx=False,  # it stacks weights of experts, and leaves their scales behind
        hf_class="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        gguf="qwen3moe",
        table=Table(_ROWS, DROP),
        defaults={**{key: value for key, value in QWEN3.defaults.items() if key not in _NONE}, **_OWN},
        check=check,
        torch_classes=torch_classes,
        gguf_keys=gguf_keys,
        words=r"\w*qwen3_?moe(ForCausalLM|Model|LMHeadModel)",
        experts=read_experts,
        library_keys=library_keys,
        runtime_experts={"normalised": True},
        numpy_block=False,
    ),
)
