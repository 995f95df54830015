"""Mixtral: Mistral's attention, and eight experts in every layer, under Llama's GGUF name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsconvert.models.architecture import Keys, TorchClasses
from dsconvert.models.architectures import mistral
from dsconvert.models.experts import Experts, mlp_rows
from dsconvert.models.tensor_table import DROP, Table
from dsconvert.models.values import Values

if TYPE_CHECKING:
    from dsconvert.models.config import ModelConfig

MISTRAL = mistral.ARCHITECTURES[0]
_AT = "block_sparse_moe."
_ROWS = (
    *(row for row in MISTRAL.table.rows if ".mlp." not in row.hf),
    *mlp_rows(_AT, f"{_AT}gate", ("w1", "w3", "w2")),
)


def read_experts(get: Values) -> Experts:
    return Experts(
        count=get.size("num_local_experts"),
        used=get.size("num_experts_per_tok"),
        size=get.size("intermediate_size"),
        normalised=True,
    )


def torch_classes() -> TorchClasses:
    from transformers import MixtralConfig
    from transformers.models.mixtral import modeling_mixtral as model

    parts = (model.MixtralDecoderLayer, model.MixtralRotaryEmbedding, model.MixtralRMSNorm)
    return TorchClasses(MixtralConfig, *parts)


def gguf_keys(config: ModelConfig) -> Keys:
    keys, experts = library_keys(config), MISTRAL.gguf_keys(config)
    return {
        **experts,
        "expert_count": ("uint32", keys["num_local_experts"]),
        "expert_used_count": ("uint32", keys["num_experts_per_tok"]),
    }


def library_keys(config: ModelConfig) -> dict[str, Any]:
    experts = config.experts
    assert experts is not None  # this layout has them
    return {"num_local_experts": experts.count, "num_experts_per_tok": experts.used}


def stored_as(keys: Mapping[str, Any], tensors: Collection[str]) -> bool:
    """Of the files of this name those with experts."""
    return bool(keys.get("llama.expert_count"))


ARCHITECTURES = (
    replace(
        MISTRAL,
        mlx=False,  # it stacks weights of experts, and leaves their scales behind
        hf_class="MixtralForCausalLM",
        model_type="mixtral",
        table=Table(_ROWS, DROP),
        defaults={
            **MISTRAL.defaults,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        torch_classes=torch_classes,
        gguf_keys=gguf_keys,
        words=r"\w*mixtral(ForCausalLM|Model|LMHeadModel)",
        experts=read_experts,
        library_keys=library_keys,
        attributes=lambda name: name.replace(_AT, "mlp.", 1),
        stored_as=stored_as,
        runtime_experts={"normalised": True},
        numpy_block=False,
    ),
)
