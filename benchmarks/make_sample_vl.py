"""Make the towers of the embedded sample with pictures: SigLIP-shaped, random, scaled so that all counts.

    python benchmarks/make_sample_vl.py --out dsconvert/sample_vl

Nothing is trained here: matrices have the deviation 1/sqrt(fan in), norms are 1 +- 0.2, biases have 0.2, so
that a lost bias or a wrong activation moves the embeddings. The decoder is the other sample's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration

SEED = 20240308
IMAGE = "<image_placeholder>"
TOWER = {
    "hidden_act": "gelu",
    "hidden_size": 64,
    "image_size": 384,
    "intermediate_size": 128,
    "layer_norm_eps": 1e-6,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "patch_size": 16,
    "vision_use_head": False,
}


def towers(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random weights in bfloat16 by transformers' names."""
    with torch.device("meta"):
        names = DeepseekVLForConditionalGeneration(DeepseekVLConfig(**config)).state_dict()
    rng = np.random.default_rng(SEED)
    found = {}
    for name, value in names.items():
        if name.startswith(("model.vision_model.", "model.aligner.")):
            x = rng.standard_normal(tuple(value.shape))
            if name.endswith("bias"):
                x *= 0.2
            elif "norm" in name:
                x = 1 + 0.2 * x
            else:
                x *= 0.5 if "position" in name else 1 / np.sqrt(np.prod(x.shape[1:]))
            found[name] = torch.from_numpy(x).to(torch.bfloat16)
    return found


def tokenizer(sample: Path, out: Path) -> int:
    """The sample's tokenizer with the token for pictures after its last one; returns the token's id."""
    library = Tokenizer.from_file(str(sample / "tokenizer.json"))
    library.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    library.save(str(out / "tokenizer.json"))
    token_id = library.token_to_id(IMAGE)
    config = json.loads((sample / "tokenizer_config.json").read_text("utf-8"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config["added_tokens_decoder"][str(token_id)] = {"content": IMAGE, **flags}
    config["additional_special_tokens"] = [IMAGE]
    config.pop("chat_template", None)
    write(out / "tokenizer_config.json", config)
    return int(token_id)


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=Path, default=Path("dsconvert/sample"))
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    text = json.loads((asked.sample / "config.json").read_text("utf-8"))
    text = {key: value for key, value in text.items() if key not in ("architectures", "torch_dtype")}
    config = {
        "architectures": ["DeepseekVLForConditionalGeneration"],
        "image_token_id": tokenizer(asked.sample, asked.out),
        "model_type": "deepseek_vl",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": TOWER,
    }
    write(asked.out / "config.json", config)
    half = [0.5, 0.5, 0.5]
    pixels = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": half,
        "image_std": half,
    }
    pixels |= {"image_processor_type": "DeepseekVLImageProcessor", "min_size": 14, "resample": 3}
    pixels |= {"rescale_factor": 1 / 255, "size": {"height": 384, "width": 384}}
    write(asked.out / "preprocessor_config.json", pixels)
    write(
        asked.out / "processor_config.json",
        {"num_image_tokens": 576, "processor_class": "DeepseekVLProcessor"},
    )
    save_file(towers(config), asked.out / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
