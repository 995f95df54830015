"""Tiny random checkpoints with experts and latent attention, of transformers' own classes, fp8 too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiny_families
from safetensors.torch import save_file

Floats = npt.NDArray[np.float32]
BLOCK = 128
LATENT = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "moe_intermediate_size": 256,
}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
# By name: transformers' class, and what its config says beside LATENT.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": (
        "DeepseekV2ForCausalLM",
        {
            "num_hidden_layers": 4, "q_lora_rank": 256, "n_routed_experts": 16, "num_experts_per_tok": 4,
            "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
            "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "v2-lite": (
        "DeepseekV2ForCausalLM",
        {
            "num_hidden_layers": 27, "q_lora_rank": None, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "n_shared_experts": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 128,
        },
    ),
    "v3": (
        "DeepseekV3ForCausalLM",
        {
            "num_hidden_layers": 4, "q_lora_rank": 256, "n_routed_experts": 16, "num_experts_per_tok": 4,
            "n_shared_experts": 1, "first_k_dense_replace": 2, "n_group": 4, "topk_group": 2,
            "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "num_mtp_layers": 0,
        },
    ),
    "v32": (
        "DeepseekV32ForCausalLM",
        {
            "num_hidden_layers": 4, "q_lora_rank": 256, "n_routed_experts": 16, "num_experts_per_tok": 4,
            "n_shared_experts": 1, "first_k_dense_replace": 2, "n_group": 4, "topk_group": 2,
            "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            "index_n_heads": 32, "index_head_dim": 64, "index_topk": 64,
        },
    ),
    "qwen3moe": (
        "Qwen3MoeForCausalLM",
        {
            "num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 32, "rope_theta": 1e6,
            "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True,
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {"num_hidden_layers": 3, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "deepseek": (
        "DeepseekForCausalLM",
        {
            "num_hidden_layers": 3, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 2,
            "first_k_dense_replace": 1, "norm_topk_prob": False, "rope_theta": 10000.0,
        },
    ),
}  # fmt: skip
# Of V3 a dense layer and one of eight small experts.
SMALL_V3: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "kv_lora_rank": 64,
    "q_lora_rank": 64, "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
}  # fmt: skip
MODEL_TYPES = {"v2": "deepseek_v2", "v2-lite": "deepseek_v2", "v3": "deepseek_v3", "v32": "deepseek_v32"}
MODEL_TYPES |= {"qwen3moe": "qwen3_moe", "mixtral": "mixtral", "deepseek": "deepseek"}
MLA = ("v2", "v2-lite", "v3", "v32")


def random_model(name: str, seed: int = 3, **more: Any) -> Any:
    """transformers' model: weights of deviation 1/sqrt(inputs), norms 1 +- .2, routers thrice that."""
    import torch
    import transformers

    kind, keys = FAMILIES[name]
    sizes = {**LATENT, **keys, **more}
    if name == "deepseek":
        model = first_model(sizes)
    else:
        config = getattr(transformers, kind.replace("ForCausalLM", "Config"))(**sizes)
        model = getattr(transformers, kind)(config).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=random)
            if parameter.endswith("norm.weight"):
                tensor.copy_(1 + 0.2 * noise.clamp(-2, 2))
            elif parameter.endswith("e_score_correction_bias"):
                tensor.copy_(0.3 * noise)
            elif not parameter.endswith("inv_freq"):
                tensor.copy_(
                    noise * tensor.shape[-1] ** -0.5 * (3 if parameter.endswith("gate.weight") else 1)
                )
    return model


def first_model(sizes: dict[str, Any]) -> Any:
    """DeepSeekMoE-16B's, of which transformers has no class: Llama's with V2's experts from a layer on."""
    import transformers
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config = transformers.LlamaConfig(
        **sizes, num_experts=sizes["n_routed_experts"], topk_method="greedy", routed_scaling_factor=1.0,
        n_group=None, topk_group=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers[sizes["first_k_dense_replace"] :]:
        layer.mlp = DeepseekV2Moe(config)
    return model


def checkpoint(folder: Path, name: str, changes: dict[str, Any] | None = None, **more: Any) -> Path:
    """The model of `random_model` saved by transformers in float32, its config.json with `changes`."""
    model = random_model(name, **more)
    if name == "deepseek":
        folder.mkdir(parents=True)
        save_file(on_disk(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
        kind, keys = FAMILIES[name]
        stated = {**LATENT, **keys, **more, "architectures": [kind], "model_type": "deepseek"}
        (folder / "config.json").write_text(json.dumps(stated), "utf-8")
    else:
        model.save_pretrained(folder)
    for file in tiny_families.SAMPLE.iterdir():
        if file.is_file() and "token" in file.name:
            shutil.copyfile(file, folder / file.name)
    restate(folder, **(changes or {}))
    return folder


def on_disk(state: dict[str, Any]) -> dict[str, Any]:
    """transformers' state with a tensor for each matrix of an expert, as save_pretrained splits stacks."""
    found: dict[str, Any] = {}
    for name, tensor in state.items():
        at, _, stack = name.rpartition("experts.")
        if stack not in ("gate_up_proj", "down_proj"):
            found[name] = tensor.contiguous()
            continue
        for e, matrix in enumerate(tensor):
            parts = matrix.chunk(2) if stack == "gate_up_proj" else (matrix,)
            names = ("gate_proj", "up_proj") if stack == "gate_up_proj" else ("down_proj",)
            found |= {
                f"{at}experts.{e}.{n}.weight": p.contiguous() for n, p in zip(names, parts, strict=True)
            }
    return found


def given(model: Any, ids: npt.NDArray[np.int64]) -> dict[str, Any]:
    """What each module of transformers' model was given and what it made of it, by its name."""
    import torch

    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.update({name: (args, output)})

    for name, module in model.named_modules():
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        model(torch.from_numpy(ids))
    return seen


def restate(folder: Path, **changes: Any) -> None:
    """Other values in config.json; without the key for the value ...."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}), "utf-8")


def weights(folder: Path) -> dict[str, Any]:
    """The tensors on disk, as torch has them."""
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def is_fp8(name: str) -> bool:
    """Whether published checkpoints have a tensor in fp8: the matrices of the blocks, but the routers."""
    matrices = ("with_mqa.weight", "indexer.wq_b.weight", "indexer.wk.weight")
    layered = name.startswith("model.layers.") and not name.endswith("weights_proj.weight")
    return (layered and name.endswith("_proj.weight")) or name.endswith(matrices)


def to_fp8(folder: Path, scales: str = "f32") -> tuple[Path, Path]:
    """The checkpoint in fp8 and what it stands for in float32, two folders beside it.

    `scales` are "f32", powers of two in f32 ("ue8m0") or f8_e8m0. The float32 one is what torch makes of it.
    """
    import torch

    stored: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for name, weight in weights(folder).items():
        if not is_fp8(name):
            stored[name] = weight.float() if name.endswith("bias") else weight.bfloat16()
            plain[name] = stored[name].float()
            continue
        grid = [-(-size // BLOCK) for size in weight.shape]
        blocks = torch.nn.functional.pad(
            weight, (0, grid[1] * BLOCK - weight.shape[1], 0, grid[0] * BLOCK - weight.shape[0])
        )
        top = blocks.reshape(grid[0], BLOCK, grid[1], BLOCK).abs().amax((1, 3)).clamp(min=1e-12) / 448
        scale = top if scales == "f32" else torch.exp2(torch.ceil(torch.log2(top)))
        each = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[
            : weight.shape[0], : weight.shape[1]
        ]
        stored[name] = (weight / each).to(torch.float8_e4m3fn)
        kept = scale.to(torch.float8_e8m0fnu) if scales == "f8_e8m0" else scale
        stored[f"{name}_scale_inv"] = kept
        plain[name] = stored[name].float() * each
    folders = []
    for kind, tensors in ((scales, stored), ("plain", plain)):
        other = folder.with_name(f"{folder.name}-{kind}")
        shutil.copytree(folder, other)
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        folders.append(other)
    stated = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    restate(folders[0], quantization_config={**stated, "weight_block_size": [BLOCK, BLOCK]})
    return folders[0], folders[1]


def with_mtp(folder: Path, layer: int, like: int) -> None:
    """Add the layer that predicts the token after the next, as published checkpoints have it."""
    import torch

    tensors = weights(folder)
    d = tensors["model.norm.weight"].shape[0]
    at = f"model.layers.{layer}."
    more = {
        at + n.split(".", 3)[3]: t.clone()
        for n, t in tensors.items()
        if n.startswith(f"model.layers.{like}.")
    }
    more |= {at + name: torch.ones(d) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    more[at + "eh_proj.weight"] = torch.zeros(d, 2 * d)
    for name in ("embed_tokens", "shared_head.head"):
        more[f"{at}{name}.weight"] = tensors["lm_head.weight"].clone()
    save_file({**tensors, **more}, folder / "model.safetensors", {"format": "pt"})


def stored(tensors: dict[str, Floats], heads: int = 4, nope: int = 64, pairs: int = 0) -> dict[str, Floats]:
    """The tensors of llama.cpp's file by the table of its converter: experts stacked, kv_b in two.

    With `pairs`, the head's size, rows of q and k as adjacent pairs.
    """
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.q_b_proj": "attn_q_b", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "mlp.gate": "ffn_gate_inp", "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
        "mlp.shared_experts.up_proj": "ffn_up_shexp", "mlp.shared_experts.down_proj": "ffn_down_shexp",
        "self_attn.indexer.wq_b": "indexer.attn_q_b", "self_attn.indexer.wk": "indexer.attn_k",
        "self_attn.indexer.k_norm": "indexer.k_norm", "self_attn.indexer.weights_proj": "indexer.proj",
    }  # fmt: skip
    found: dict[str, Floats] = {}
    stacks: dict[str, dict[int, Floats]] = {}
    for name, array in tensors.items():
        if name in tiny_families.WHOLE:
            found[tiny_families.WHOLE[name]] = array
            continue
        _, _, layer, rest = name.split(".", 3)
        part, _, end = rest.replace("block_sparse_moe.", "mlp.").rpartition(".")
        if end == "e_score_correction_bias":
            found[f"blk.{layer}.exp_probs_b.bias"] = array
        elif part == "self_attn.kv_b_proj":
            both = array.reshape(heads, -1, array.shape[1])
            found[f"blk.{layer}.attn_k_b.weight"] = both[:, :nope].transpose(0, 2, 1)
            found[f"blk.{layer}.attn_v_b.weight"] = both[:, nope:]
        elif part.startswith("mlp.experts."):
            _, _, expert, kind = part.split(".")
            kind = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(kind, kind)
            stacks.setdefault(f"blk.{layer}.ffn_{kind[:-5]}_exps.weight", {})[int(expert)] = array
        elif rest in tiny_families.LAYER:
            found |= tiny_families.stored({name: array}, pairs)
        else:
            found[f"blk.{layer}.{names[part]}.{end}"] = array
    return found | {name: np.stack([each[e] for e in sorted(each)]) for name, each in stacks.items()}
