"""Tiny random checkpoints of transformers' own classes, and what llama.cpp's files of them hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SAMPLE = Path(__file__).parents[2] / "dsconvert" / "sample"
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
}
# By name: transformers' class, and what its config says beside SIZES.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {"rope_theta": 1e6, "rms_norm_eps": 1e-5}),
    "qwen3": ("Qwen3ForCausalLM", {"rope_theta": 1e6, "head_dim": 32}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 32, "rope_theta": 1e6}),
}
# The tensors of a layer: Hugging Face name -> GGUF name, llama.cpp's table written out.
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def random_model(name: str, seed: int = 3, **more: Any) -> Any:
    """transformers' model: weights of deviation 1/sqrt(inputs), norms 1 +- .2, biases .2."""
    import torch
    import transformers

    kind, keys = FAMILIES[name]
    config = getattr(transformers, kind.replace("ForCausalLM", "Config"))(**{**SIZES, **keys, **more})
    model = getattr(transformers, kind)(config).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=random)
            if parameter.endswith("norm.weight"):
                tensor.copy_(1 + 0.2 * noise.clamp(-2, 2))
            else:
                tensor.copy_(noise * (0.2 if tensor.ndim == 1 else tensor.shape[-1] ** -0.5))
    return model


def checkpoint(folder: Path, name: str, changes: dict[str, Any] | None = None, **more: Any) -> Path:
    """The model of `random_model` saved by transformers in float32, its config.json with `changes`."""
    random_model(name, **more).save_pretrained(folder)
    for file in SAMPLE.iterdir():
        if file.is_file() and "token" in file.name:
            shutil.copyfile(file, folder / file.name)
    path = folder / "config.json"
    raw = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**raw, **(changes or {})}), "utf-8")
    return folder


def stored(tensors: dict[str, npt.NDArray[np.float32]], pairs: int) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors of llama.cpp's file; with `pairs`, the head's size, rows of q and k as adjacent pairs."""
    found = {}
    for name, array in tensors.items():
        if name in WHOLE:
            found[WHOLE[name]] = array
            continue
        _, _, layer, rest = name.split(".", 3)
        if pairs and rest.split(".")[1] in ("q_proj", "k_proj"):
            rows = [
                head * pairs + part * pairs // 2 + pair
                for head in range(array.shape[0] // pairs)
                for pair in range(pairs // 2)
                for part in (0, 1)
            ]
            found[f"blk.{layer}.{LAYER[rest]}"] = array[rows]
        else:
            found[f"blk.{layer}.{LAYER[rest]}"] = array
    return found
