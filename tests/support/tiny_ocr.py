"""Tiny random DeepSeek-OCR and OCR-2, saved by transformers' own classes under the published names.

transformers has OCR's towers in its Unlimited-OCR, whose decoder is OCR's too where a text is no longer than
its window.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
from tokenizers import AddedToken, Tokenizer

IMAGE, VOCAB = "<image>", 512
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 2048,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SAM: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "output_channels": 16,
    "mlp_dim": 64,
    "global_attn_indexes": [2],
    "downsample_channels": [32, 64],
}
CLIP: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
QWEN2: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def model(second: bool, seed: int = 0) -> Any:
    """transformers' model: weights of deviation 1/sqrt(inputs), norms 1 +- .2, biases .2."""
    import torch
    import transformers

    text = {**TEXT, "mlp_layer_types": ["dense", "sparse", "sparse"]}
    if second:
        vision = {"sam_config": SAM, "encoder_config": QWEN2}
        config = transformers.DeepseekOcr2Config(text_config=text, vision_config=vision)
        made = transformers.DeepseekOcr2ForConditionalGeneration(config)
    else:
        vision = {"sam_config": SAM, "encoder_config": {**CLIP, "num_attention_heads": 4}}
        config = transformers.UnlimitedOcrConfig(
            text_config={**text, "sliding_window": 2048}, vision_config=vision
        )
        made = transformers.UnlimitedOcrForConditionalGeneration(config)
    made.config.image_token_id = token_id()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            noise = torch.randn(tensor.shape, generator=random)
            if name.endswith("bias"):
                tensor.copy_(0.2 * noise)
            elif "norm" in name or "layrnorm" in name:
                tensor.copy_(1 + 0.2 * noise.clamp(-2, 2))
            elif "pos" in name or "embed" in name or "query" in name or noise.ndim == 1:
                tensor.copy_(0.5 * noise)
            else:
                tensor.copy_(noise / noise[0].numel() ** 0.5 * (3 if "gate.weight" in name else 1))
    return made.eval()


def checkpoint(folder: Path, made: Any, second: bool, published: bool = True) -> Path:
    """The model as transformers saves it, with the config of the published files or transformers' own."""
    made.save_pretrained(folder)
    stated = json.loads((folder / "config.json").read_text("utf-8"))
    if published:
        language = {**TEXT, "first_k_dense_replace": 1, "use_mla": False, "kv_lora_rank": None}
        language |= {"qk_rope_head_dim": 0, "architectures": ["DeepseekV2ForCausalLM"]}
        width: dict[str, Any] = {"sam_vit_b": renamed(SAM)}
        if second:
            width["qwen2-0-5b"] = {"dim": QWEN2["hidden_size"]}
        else:
            clip = {**CLIP, "num_attention_heads": 4, "image_size": 224, "patch_size": 14}
            width["clip-l-14-224"] = renamed({k: v for k, v in clip.items() if k != "intermediate_size"})
        stated = {
            "architectures": ["DeepseekOCR2ForCausalLM" if second else "DeepseekOCRForCausalLM"],
            "model_type": "deepseek_vl_v2",
            "auto_map": {"AutoModel": "modeling_deepseekocr.Model"},
            "language_config": language,
            "projector_config": {"input_dim": 128, "n_embed": 64, "projector_type": "linear"},
            "vision_config": {"image_size": 1024, "model_type": "vision", "width": width},
            "torch_dtype": "float32",
        }
    tiny.write_json(folder / "config.json", stated)
    tiny.write_tokenizer(folder, VOCAB - 1)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(_tokenizer().to_str(), "utf-8")
    return folder


def renamed(part: dict[str, Any]) -> dict[str, Any]:
    """Sizes under the published names."""
    names = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"}
    return {names.get(key, key): value for key, value in part.items()}


def _tokenizer() -> Any:
    tokenizer = Tokenizer.from_str(tiny.tokenizer_json(VOCAB - 1))
    tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    return tokenizer


def token_id() -> int:
    """The id of the token for pictures."""
    found = _tokenizer().token_to_id(IMAGE)
    assert found is not None
    return int(found)
