"""DeepSeek V2, V2-Lite, V2.5, Coder-V2, V3, R1 and V3.1: latent attention, experts after the first layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsconvert.models.architecture import (
    Architecture,
    Keys,
    TorchClasses,
    check_full_attention,
    unwritable,
    usual_keys,
)
from dsconvert.models.experts import (
    LATENT_ATTENTION,
    SIGMOID,
    SOFTMAX,
    Experts,
    Latent,
    expert_keys,
    latent_keys,
    mlp_rows,
)
from dsconvert.models.tensor_table import DROP, Row, Table
from dsconvert.models.values import Values

if TYPE_CHECKING:
    from dsconvert.models.config import ModelConfig

_L = "model.layers.{i}."
ROWS = (
    Row("model.embed_tokens.weight", "token_embd.weight", "embed", ("v", "d")),
    Row("model.norm.weight", "output_norm.weight", "norm", ("d",)),
    Row("lm_head.weight", "output.weight", "head", ("v", "d"), tied_to="model.embed_tokens.weight"),
    Row(_L + "input_layernorm.weight", "blk.{i}.attn_norm.weight", "norm", ("d",)),
    *LATENT_ATTENTION,
    Row(_L + "post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", "norm", ("d",)),
    *mlp_rows(),
)
COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
V2_DEFAULTS = {
    **COMMON,
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "first_k_dense_replace": 0,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "moe_intermediate_size": 1407,
}
V3_DEFAULTS = {
    **COMMON,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "moe_intermediate_size": 2048,
    "rope_interleave": True,
}
NORM_EPS = (
    1e-6  # of the norms inside of attention, in transformers and in the original, whatever config.json says
)


def read_latent(get: Values) -> Latent:
    rank = get.stated("q_lora_rank")
    return Latent(
        q_rank=None if rank is None else get.size("q_lora_rank"),
        kv_rank=get.size("kv_lora_rank"),
        nope=get.size("qk_nope_head_dim"),
        rope=get.size("qk_rope_head_dim"),
        value=get.size("v_head_dim"),
    )


def read_experts(get: Values, gating: str, grouped: bool) -> Experts:
    """The numbers of the experts; without `grouped` choice the groups of config.json say nothing."""
    groups, used = (max(get.whole(key), 1) if grouped else 1 for key in ("n_group", "topk_group"))
    found = Experts(
        count=get.size("n_routed_experts"),
        used=get.size("num_experts_per_tok"),
        size=get.size("moe_intermediate_size"),
        first=get.whole("first_k_dense_replace"),
        shared=get.whole("n_shared_experts"),
        gating=gating,
        bias=gating == SIGMOID,
        groups=groups,
        groups_used=used,
        normalised=get.flag("norm_topk_prob"),
        scale=get.number("routed_scaling_factor"),
    )
    if found.count % groups or used > groups:
        raise get.wrong("n_group", f"is {groups} with topk_group {used}, for {found.count} experts")
    if found.used > found.count // groups * used:
        raise get.wrong("num_experts_per_tok", f"is {found.used}, more experts than there are to choose from")
    return found


def check(get: Values) -> None:
    """What holds for all: no biases, and experts in every layer after the first dense ones."""
    for key in ("attention_bias", "mlp_bias"):
        if key in get.defaults and get.flag(key):
            raise get.wrong(key, "is true, and this layout has no such biases")
    if get.raw.get("moe_layer_freq", 1) != 1:
        raise get.wrong("moe_layer_freq", "is not 1, and here all layers after the dense ones have experts")
    if get.raw.get("ep_size", 1) != 1:
        raise get.wrong("ep_size", "is not 1: the experts of this checkpoint lie in several parts")
    check_full_attention(get, "")


def check_scores(get: Values, only: str) -> None:
    if get.raw.get("scoring_func", only) != only:
        raise get.wrong(
            "scoring_func", f"is {get.raw['scoring_func']!r:.40}, and this class scores by {only}"
        )


def check_v2(get: Values) -> None:
    check(get)
    check_scores(get, SOFTMAX)
    if get.flag("norm_topk_prob"):
        why = "is true, which transformers ignores and llama.cpp obeys: published models have false"
        raise get.wrong("norm_topk_prob", why)
    if get.stated("topk_method") not in ("greedy", "group_limited_greedy"):
        raise get.wrong(
            "topk_method", f"is {get.stated('topk_method')!r:.40}, known: greedy, group_limited_greedy"
        )


def check_v3(get: Values) -> None:
    check(get)
    check_scores(get, SIGMOID)
    if get.raw.get("topk_method", "noaux_tc") != "noaux_tc":
        raise get.wrong(
            "topk_method", f"is {get.raw['topk_method']!r:.40}, and this class knows noaux_tc alone"
        )


def torch_v2() -> TorchClasses:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as model

    return TorchClasses(
        DeepseekV2Config,
        model.DeepseekV2DecoderLayer,
        model.DeepseekV2RotaryEmbedding,
        model.DeepseekV2RMSNorm,
    )


def torch_v3() -> TorchClasses:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as model

    return TorchClasses(
        DeepseekV3Config,
        model.DeepseekV3DecoderLayer,
        model.DeepseekV3RotaryEmbedding,
        model.DeepseekV3RMSNorm,
    )


def library_keys(config: ModelConfig) -> dict[str, Any]:
    experts, latent = config.experts, config.latent
    assert experts is not None  # this layout has both
    assert latent is not None
    scaling, rope = config.rope_scaling, {}
    if scaling is not None and scaling.type == "yarn":
        size = {"mscale": scaling.mscale_all_dim, "mscale_all_dim": scaling.mscale_all_dim}
        original = scaling.original_context or config.context_length
        rope = {
            "rope_scaling": {
                "type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": original,
                **{key: value for key, value in size.items() if value is not None},
            }
        }
    return {
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.nope,
        "qk_rope_head_dim": latent.rope,
        "v_head_dim": latent.value,
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.used,
        "moe_intermediate_size": experts.size,
        "first_k_dense_replace": experts.first,
        "n_shared_experts": experts.shared,
        "n_group": experts.groups,
        "topk_group": experts.groups_used,
        "norm_topk_prob": experts.normalised,
        "routed_scaling_factor": experts.scale,
        **rope,
    }


def gguf_keys(config: ModelConfig) -> Keys:
    """Raises CheckpointError for what llama.cpp would run as another model, or not load."""
    experts, latent = config.experts, config.latent
    assert experts is not None  # this layout has both
    assert latent is not None
    layers, vocab = config.layers, config.vocab_size
    if latent.q_rank is None and layers not in (26, 27) and (layers, vocab) != (48, 128256):
        raise unwritable(
            f"{layers} layers without q_lora_rank",
            "llama.cpp takes such a model for V2-Lite by its 26 or 27 layers, and loads no other",
        )
    if config.decoder.get("rope_interleave") is False:
        raise unwritable(
            "rope_interleave false", "llama.cpp always turns adjacent pairs of this architecture"
        )
    return {
        **usual_keys(config),
        **expert_keys(experts),
        "vocab_size": ("uint32", vocab),
        **latent_keys(latent),
    }


def gguf_notes(config: ModelConfig) -> tuple[str, ...]:
    """Where llama.cpp computes something else than the model's authors; the file is the same for both."""
    notes = []
    if config.experts is not None and config.experts.chosen_otherwise:
        notes.append(
            "llama.cpp takes groups of experts by the sum of their two best scores, this model by the best: "
            "some go to other experts there (mean KL .03 on a random model of 4 groups); verify says how many"
        )
    if config.norm_eps != NORM_EPS:
        notes.append(
            f"config.json states rms_norm_eps {config.norm_eps:g}; the norms inside of attention have 1e-6 "
            "in transformers and in the original, and the stated one in llama.cpp"
        )
    return tuple(notes)


def stored_as_v3(keys: Mapping[str, Any], tensors: Collection[str]) -> bool:
    """V3's files have a bias on the choice of experts, or say that scores are sigmoids."""
    biased = any(name.endswith(".exp_probs_b.bias") for name in tensors)
    return biased or keys.get("deepseek2.expert_gating_func") == 2


V2 = Architecture(
    hf_class="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    gguf="deepseek2",
    table=Table(ROWS, DROP),
    defaults=V2_DEFAULTS,
    check=check_v2,
    torch_classes=torch_v2,
    gguf_keys=gguf_keys,
    words=r"\w*deepseek_?v2(ForCausalLM|Model|LMHeadModel)",
    nulls=("q_lora_rank",),
    latent=read_latent,
    experts=lambda get: read_experts(get, SOFTMAX, get.stated("topk_method") == "group_limited_greedy"),
    library_keys=lambda config: {
        **library_keys(config),
        "topk_method": "group_limited_greedy" if config.experts and config.experts.groups > 1 else "greedy",
    },
    gguf_notes=gguf_notes,
    numpy_block=False,
    mlx=True,
)
V3 = replace(
    V2,
    hf_class="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    defaults=V3_DEFAULTS,
    check=check_v3,
    torch_classes=torch_v3,
    words=r"\w*deepseek_?v3(ForCausalLM|Model|LMHeadModel)",
    experts=lambda get: read_experts(get, SIGMOID, grouped=True),
    library_keys=library_keys,
    stored_as=stored_as_v3,
)
ARCHITECTURES = (V2, V3)
