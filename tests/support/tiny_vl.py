"""Makes DeepSeek-VL and Janus checkpoints of any size in the published layouts, without a download.

The weights are scaled so that every part of the towers matters: matrices have the deviation
1/sqrt(fan in), norms are 1 +- 0.2, biases have 0.2, the mixing factor of the second neck is 0.37. Names and
shapes are written down here, apart from the project's tables; tests hold them against transformers' own.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import tiny

from dsconvert.vision import tower_sizes

Floats = npt.NDArray[np.float32]
Layout = Literal["original", "transformers", "transformers4"]
IMAGE = "<image_placeholder>"
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5, 0.5, 0.5]


@dataclass(frozen=True)
class VL:
    """The sizes of a model; the towers' defaults are tiny, `full()` gives the published ones."""

    hybrid: bool = False
    janus: bool = False
    layers: int = 2
    d: int = 64
    ff: int = 160
    heads: int = 4
    vocab: int = 512
    width: int = 32
    mlp: int = 64
    depth: int = 2
    tower_heads: int = 2
    image: int = 64
    patch: int = 16
    sam_width: int = 32
    sam_mlp: int = 128
    sam_depth: int = 3
    sam_heads: int = 2
    sam_image: int = 256
    window: int = 4
    global_layers: tuple[int, ...] = (1, 2)
    channels: int = 8
    dtype: Literal["bf16", "f16", "f32"] = "f16"
    seed: int = 0

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2


def full(*, hybrid: bool, **changes: Any) -> VL:
    """The published towers and widths, with few decoder layers and a small vocabulary."""
    sizes: dict[str, Any] = (
        {"d": 4096, "ff": 1024, "heads": 32} if hybrid else {"d": 2048, "ff": 5632, "heads": 16}
    )
    towers = {"width": 1024, "mlp": 4096, "depth": 24, "tower_heads": 16, "image": 384}
    sam = {"sam_width": 768, "sam_mlp": 3072, "sam_depth": 12, "sam_heads": 12, "sam_image": 1024}
    rest = {"window": 14, "global_layers": (2, 5, 8, 11), "channels": 256, "layers": 1}
    return VL(**{"hybrid": hybrid, **sizes, **towers, **sam, **rest, **changes})


def shapes(o: VL) -> dict[str, tuple[int, ...]]:
    """Names and shapes in transformers' layout."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, *shape: int) -> None:
        found[name + ".weight"] = shape
        found[name + ".bias"] = shape[:1]

    v, w = "model.vision_model.", o.width
    linear(v + "embeddings.patch_embedding", w, 3, o.patch, o.patch)
    found[v + "embeddings.position_embedding.weight"] = (o.tokens, w)
    for i in range(o.depth):
        at = f"{v}encoder.layers.{i}."
        for name in ("layer_norm1", "layer_norm2"):
            linear(at + name, w)
        for name in ("q_proj", "k_proj", "v_proj", "projection_layer" if o.janus else "out_proj"):
            linear(at + "self_attn." + name, w, w)
        linear(at + "mlp.fc1", o.mlp, w)
        linear(at + "mlp.fc2", w, o.mlp)
    linear(v + "post_layernorm", w)
    if o.hybrid:
        found |= _sam_shapes(o)
        linear("model.aligner.vision_proj", o.d // 2, w)
        linear("model.aligner.high_res_vision_proj", o.d // 2, 4 * o.channels)
        linear("model.aligner.proj", o.d, o.d)
    else:
        linear("model.aligner." + ("fc1" if o.janus else "linear1"), o.d, w)
        linear("model.aligner." + ("hidden_layers.0" if o.janus else "linear2"), o.d, o.d)
    found |= making_pictures(o.d) if o.janus else {}
    decoder = tiny.Tiny(layers=o.layers, d=o.d, ff=o.ff, heads=o.heads, kv_heads=o.heads, vocab=o.vocab)
    for name, shape in tiny.tiny_shapes(decoder).items():
        found[re.sub(r"^model\.", "model.language_model.", name)] = shape
    return found


def making_pictures(d: int) -> dict[str, tuple[int, ...]]:
    """Some of the tensors that make pictures, whose names differ between the layouts."""
    found: dict[str, tuple[int, ...]] = {"model.generation_embeddings.weight": (16, 8)}
    for name, *shape in (
        ("vqmodel.encoder.conv_in", 32, 3, 3, 3),
        ("vqmodel.encoder.down.0.block.0.conv1", 32, 32, 3, 3),
        ("vqmodel.encoder.mid.block_1.norm1", 32),
        ("vqmodel.decoder.mid.attn_1.q", 32, 32, 1, 1),
        ("vqmodel.decoder.up.1.block.0.conv2", 32, 32, 3, 3),
        ("generation_aligner.fc1", d, 8),
        ("generation_aligner.hidden_layers.0", d, d),
        ("generation_head.proj_out", d, d),
        ("generation_head.vision_head", 16, d),
    ):
        found |= {f"model.{name}.weight": tuple(shape), f"model.{name}.bias": tuple(shape[:1])}
    return found


def _sam_shapes(o: VL) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.high_res_vision_alpha": (1,)}
    at, w, grid, a = (
        "model.high_res_vision_model.vision_encoder.",
        o.sam_width,
        o.sam_image // o.patch,
        o.channels,
    )

    def linear(name: str, *shape: int) -> None:
        found[name + ".weight"] = shape
        found[name + ".bias"] = shape[:1]

    found[at + "pos_embed"] = (1, grid, grid, w)
    linear(at + "patch_embed.projection", w, 3, o.patch, o.patch)
    for i in range(o.sam_depth):
        layer = f"{at}layers.{i}."
        side = grid if i in o.global_layers else o.window
        for name in ("layer_norm1", "layer_norm2"):
            linear(layer + name, w)
        found[layer + "attn.rel_pos_h"] = found[layer + "attn.rel_pos_w"] = (2 * side - 1, w // o.sam_heads)
        linear(layer + "attn.qkv", 3 * w, w)
        linear(layer + "attn.proj", w, w)
        linear(layer + "mlp.lin1", o.sam_mlp, w)
        linear(layer + "mlp.lin2", w, o.sam_mlp)
    for neck in (at + "neck.", "model.high_res_vision_neck."):
        found[neck + "conv1.weight"] = (a, w, 1, 1)
        linear(neck + "layer_norm1", a)
        found[neck + "conv2.weight"] = (a, a, 3, 3)
        linear(neck + "layer_norm2", a)
    found["model.high_res_vision_proj.conv1.weight"] = (2 * a, a, 3, 3)
    found["model.high_res_vision_proj.conv2.weight"] = (4 * a, 2 * a, 3, 3)
    return found


def tensors(o: VL) -> dict[str, tiny.Array]:
    """Stored weights by transformers' name."""
    rng = np.random.default_rng(o.seed)
    return {name: tiny.encode(_values(rng, name, shape), o.dtype) for name, shape in shapes(o).items()}


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Floats:
    if name.endswith("alpha"):
        return np.full(shape, 0.37, np.float32)
    x = rng.standard_normal(shape, np.float32)
    if name.endswith("bias"):
        return x * np.float32(0.2)
    if "norm" in name:
        return 1 + x * np.float32(0.2)
    if "pos" in name or "embed_tokens" in name:
        return x * np.float32(0.5)
    return x / np.float32(np.sqrt(np.prod(shape[1:])))


def original(source: dict[str, tiny.Array], o: VL) -> dict[str, tiny.Array]:
    """The same weights in the original layout, with what the original repositories carry besides."""
    low = "vision_model.vision_tower_low.vision_tower." if o.hybrid else "vision_model.vision_tower."
    high = "vision_model.vision_tower_high.vision_tower."
    sam = r"model\.high_res_vision_model\.vision_encoder\."
    rules = [
        (r"model\.vision_model\.embeddings\.position_embedding\.weight", low + "pos_embed"),
        (r"model\.vision_model\.embeddings\.patch_embedding", low + "patch_embed.proj"),
        (r"model\.vision_model\.post_layernorm", low + "norm"),
        (r"model\.vision_model\.encoder\.layers\.(\d+)\.layer_norm", low + r"blocks.\1.norm"),
        (r"model\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.(out_proj|projection_layer)",
         low + r"blocks.\1.attn.proj"),
        (r"model\.vision_model\.encoder\.layers\.(\d+)\.mlp", low + r"blocks.\1.mlp"),
        (sam + r"patch_embed\.projection", high + "patch_embed.proj"),
        (sam + r"neck\.conv1", high + "neck.0"),
        (sam + r"neck\.layer_norm1", high + "neck.1"),
        (sam + r"neck\.conv2", high + "neck.2"),
        (sam + r"neck\.layer_norm2", high + "neck.3"),
        (r"model\.high_res_vision_neck\.conv1", high + "neck_hd.0"),
        (r"model\.high_res_vision_neck\.layer_norm1", high + "neck_hd.1"),
        (r"model\.high_res_vision_neck\.conv2", high + "neck_hd.2"),
        (r"model\.high_res_vision_neck\.layer_norm2", high + "neck_hd.3"),
        (r"model\.high_res_vision_proj\.conv1", high + "downsamples.0"),
        (r"model\.high_res_vision_proj\.conv2", high + "downsamples.1"),
        (r"model\.high_res_vision_alpha", high + "hd_alpha_downsamples"),
        (sam + r"layers\.(\d+)\.layer_norm", high + r"blocks.\1.norm"),
        (sam + r"layers\.", high + "blocks."),
        (sam, high),
        (r"model\.aligner\.(linear1|fc1)", "aligner.layers.0"),
        (r"model\.aligner\.(linear2|hidden_layers\.0)", "aligner.layers.2"),
        (r"model\.vqmodel\.encoder\.down\.0\.block", "gen_vision_model.encoder.conv_blocks.0.res"),
        (r"model\.vqmodel\.decoder\.up\.1\.block", "gen_vision_model.decoder.conv_blocks.1.res"),
        (r"model\.vqmodel\.encoder\.mid\.block_1", "gen_vision_model.encoder.mid.0"),
        (r"model\.vqmodel\.decoder\.mid\.attn_1", "gen_vision_model.decoder.mid.1"),
        (r"model\.vqmodel", "gen_vision_model"),
        (r"model\.generation_aligner\.fc1", "gen_aligner.layers.0"),
        (r"model\.generation_aligner\.hidden_layers\.0", "gen_aligner.layers.2"),
        (r"model\.generation_head\.proj_out", "gen_head.output_mlp_projector"),
        (r"model\.generation_head", "gen_head"),
        (r"model\.generation_embeddings", "gen_embed"),
        (r"model\.aligner\.vision_proj", "aligner.low_up_proj"),
        (r"model\.aligner\.high_res_vision_proj", "aligner.high_up_proj"),
        (r"model\.aligner\.proj", "aligner.layers.1"),
        (r"model\.language_model\.", "language_model.model."),
        (r"lm_head", "language_model.lm_head"),
    ]  # fmt: skip
    found: dict[str, tiny.Array] = {}
    for name, value in source.items():
        fused = re.fullmatch(r"model\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", name)
        if fused:
            thirds = [source[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[f"{low}blocks.{fused[1]}.attn.qkv.{fused[2]}"] = np.concatenate(thirds)
        elif not re.search(r"self_attn\.[kv]_proj", name) or "language_model" in name:
            new = next(re.sub(pattern, place, name) for pattern, place in rules if re.match(pattern, name))
            found[new] = value[None] if new == low + "pos_embed" else value
    return found | _unused(o, low, next(iter(source.values())).dtype)


def _unused(o: VL, low: str, dtype: Any) -> dict[str, tiny.Array]:
    """The attention pool and, in the hybrid, two norms: carried by the repositories, used by nothing."""
    w, at = o.width, low + "attn_pool."
    found = {at + "latent": (1, 1, w)}
    sizes = {
        "q": (w, w),
        "kv": (2 * w, w),
        "proj": (w, w),
        "norm": (w,),
        "mlp.fc1": (o.mlp, w),
        "mlp.fc2": (w, o.mlp),
    }
    for name, shape in sizes.items():
        found |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
    if o.janus:
        found["gen_vision_model.quantize.codebook_used"] = (16,)
    if o.hybrid:
        for name in ("high_layer_norm", "low_layer_norm"):
            found |= {f"vision_model.{name}.{kind}": (w,) for kind in ("weight", "bias")}
    return {name: np.zeros(shape, dtype) for name, shape in found.items()}


def tiny_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original layout names its towers; let the names stand for tiny ones."""
    o = VL()
    low = {"hidden_size": o.width, "intermediate_size": o.mlp, "num_hidden_layers": o.depth}
    high = {"hidden_size": o.sam_width, "num_hidden_layers": o.sam_depth, "num_attention_heads": o.sam_heads}
    high |= {
        "window_size": o.window,
        "global_attn_indexes": list(o.global_layers),
        "output_channels": o.channels,
    }
    monkeypatch.setattr(
        tower_sizes, "SIGLIP_L", tower_sizes.SIGLIP_L | low | {"num_attention_heads": o.tower_heads}
    )
    monkeypatch.setattr(tower_sizes, "SAM_B", tower_sizes.SAM_B | high)


def vl_checkpoint(folder: Path, o: VL, layout: Layout = "transformers") -> Path:
    """Write a checkpoint with config, processor files and tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = tensors(o)
    if layout == "original":
        stored = original(stored, o)
    if layout == "transformers4":
        stored = {
            name.replace("model.vision_model.", "model.vision_model.vision_model.", 1): value
            for name, value in stored.items()
        }
    write_weights(folder, stored)
    made = original_files(o) if layout == "original" else transformers_files(o)
    for name, value in made.items():
        tiny.write_json(folder / name, value)
    write_tokenizer(folder, o)
    return folder


def write_weights(folder: Path, stored: dict[str, tiny.Array]) -> None:
    """model.safetensors, written tensor by tensor."""
    kinds = {np.dtype(kind): name for name, kind in tiny.NUMPY.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, value in stored.items():
        header[name] = {
            "dtype": kinds[value.dtype],
            "shape": value.shape,
            "data_offsets": [begin, begin + value.nbytes],
        }
        begin += value.nbytes
    with (folder / "model.safetensors").open("wb") as file:
        file.write(tiny.with_header(header, b""))
        for value in stored.values():
            file.write(np.ascontiguousarray(value).data)


def original_files(o: VL) -> dict[str, Any]:
    """config.json and the processor files of the original layout; the decoder's config is partial."""
    low = {
        "image_size": o.image,
        "model_name": "siglip_large_patch16_384",
        "select_feature": "same",
        "select_layer": -1,
    }
    params: dict[str, Any] = low
    if o.hybrid:
        high = low | {"image_size": o.sam_image, "model_name": "sam_b_downsample", "output_dim": o.width}
        high |= {"ckpt_path": "", "pixel_mean": CLIP_MEAN, "pixel_std": CLIP_STD}
        low = low | {"ckpt_path": "", "pixel_mean": HALF, "pixel_std": HALF}
        params = {
            "concat_type": "tuple",
            "freeze_high": True,
            "freeze_low": True,
            "high_res_cfg": high,
            "low_res_cfg": low,
        }
    kind = "low_high_hybrid_split_mlp_gelu" if o.hybrid else "mlp_gelu"
    language = decoder_config(o) | {"torch_dtype": "float16"}
    making = {
        "gen_aligner_config": {"params": {"depth": 2, "input_dim": 8, "n_embed": o.d}},
        "gen_head_config": {"params": {"image_token_embed": o.d, "image_token_size": 16, "n_embed": o.d}},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16, "n_embed": 8}},
    }
    return {
        "config.json": {
            **(making if o.janus else {}),
            "architectures": ["MultiModalityCausalLM"],
            "model_type": "multi_modality",
            "aligner_config": {
                "cls": "MlpProjector",
                "model_type": "aligner",
                "params": {"depth": 2, "input_dim": o.width, "n_embed": o.d, "projector_type": kind},
            },
            "language_config": language,
            "vision_config": {
                "cls": "HybridVisionTower" if o.hybrid else "CLIPVisionTower",
                "model_type": "vision",
                "params": params,
            },
            "torch_dtype": "float16",
            "transformers_version": "4.33.1",
        },
        "preprocessor_config.json": {
            "do_normalize": not o.hybrid,
            "image_mean": CLIP_MEAN if o.hybrid else HALF,
            "image_std": CLIP_STD if o.hybrid else HALF,
            "image_processor_type": "VLMImageProcessor",
            "image_size": o.sam_image if o.hybrid else o.image,
            "min_size": 14,
            "processor_class": "VLChatProcessor",
            "rescale_factor": 1 / 255,
        },
        "processor_config.json": {
            "add_special_token": False,
            "image_tag": IMAGE,
            "mask_prompt": True,
            "num_image_tokens": o.tokens,
            "processor_class": "VLChatProcessor",
            "sft_format": "deepseek",
        },
    }


def decoder_config(o: VL) -> dict[str, Any]:
    """Only what differs from LlamaConfig's defaults, as published."""
    return {
        "hidden_size": o.d,
        "intermediate_size": o.ff,
        "max_position_embeddings": 1024,
        "model_type": "llama",
        "num_attention_heads": o.heads,
        "num_hidden_layers": o.layers,
        "num_key_value_heads": o.heads,
        "vocab_size": o.vocab,
    }


def transformers_files(o: VL) -> dict[str, Any]:
    """config.json and the processor files as transformers saves them, wrong BOS, EOS and tied flag too."""
    tower: dict[str, Any] = {
        "hidden_act": "gelu",
        "hidden_size": o.width,
        "image_size": o.image,
        "intermediate_size": o.mlp,
        "model_type": "siglip_vision_model",
        "num_attention_heads": o.tower_heads,
        "num_hidden_layers": o.depth,
        "patch_size": o.patch,
        "vision_use_head": False,
    }
    sam = {
        "global_attn_indexes": list(o.global_layers),
        "hidden_size": o.sam_width,
        "image_size": o.sam_image,
        "mlp_dim": o.sam_mlp,
        "model_type": "sam_vision_model",
        "num_attention_heads": o.sam_heads,
        "num_hidden_layers": o.sam_depth,
        "output_channels": o.channels,
        "patch_size": o.patch,
        "window_size": o.window,
    }
    text = decoder_config(o) | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": o.d // o.heads,
        "rms_norm_eps": 1e-6,
    }
    text["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
    kind = "deepseek_vl_hybrid" if o.hybrid else "janus" if o.janus else "deepseek_vl"
    name = {"deepseek_vl_hybrid": "DeepseekVLHybrid", "janus": "Janus", "deepseek_vl": "DeepseekVL"}[kind]
    config: dict[str, Any] = {
        "architectures": [name + "ForConditionalGeneration"],
        "model_type": kind,
        "image_token_id": image_id(o),
        "text_config": text,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "vision_config": tower,
    }
    image: dict[str, Any] = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": HALF,
        "image_std": HALF,
        "image_processor_type": name + "ImageProcessor",
        "min_size": 14,
        "processor_class": name + "Processor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": o.image, "width": o.image},
    }
    if o.janus:
        for key in ("intermediate_size", "vision_use_head"):
            del tower[key]
        tower |= {"mlp_ratio": o.mlp / o.width, "projection_dim": o.d, "num_image_tokens": o.tokens}
        tower["model_type"] = "janus_vision_model"
        config["vq_config"] = {
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "embed_dim": 8,
            "image_token_embed_dim": o.d,
            "latent_channels": 32,
            "model_type": "janus_vqgan",
            "num_embeddings": 16,
            "num_res_blocks": 1,
            "projection_dim": o.d,
        }
    if o.hybrid:
        config["high_res_vision_config"] = sam
        image |= {"high_res_image_mean": CLIP_MEAN, "high_res_image_std": CLIP_STD, "high_res_resample": 3}
        image["high_res_size"] = {"height": o.sam_image, "width": o.sam_image}
    chat = {"num_image_tokens": o.tokens, "processor_class": name + "Processor"}
    return {"config.json": config, "preprocessor_config.json": image, "processor_config.json": chat}


def image_id(o: VL) -> int:
    """The id of the image token in `write_tokenizer`'s vocabulary."""
    from tokenizers import Tokenizer

    found = Tokenizer.from_str(_tokenizer(o)).token_to_id(IMAGE)
    assert found is not None
    return int(found)


def write_tokenizer(folder: Path, o: VL) -> None:
    """The tiny tokenizer with further special tokens, that for pictures last as in DeepSeek-VL."""
    further = special_tokens(o)
    tiny.write_tokenizer(folder, o.vocab - len(further))
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer.json").write_text(_tokenizer(o), "utf-8")
    path = folder / "tokenizer_config.json"
    tiny.write_json(path, json.loads(path.read_text("utf-8")) | {"additional_special_tokens": further})


def special_tokens(o: VL) -> list[str]:
    """The special tokens beside BOS and EOS."""
    return [*(("<begin_of_image>", "<end_of_image>", "<|User|>", "<|Assistant|>") if o.janus else ()), IMAGE]


def _tokenizer(o: VL) -> str:
    from tokenizers import AddedToken, Tokenizer

    further = special_tokens(o)
    tokenizer = Tokenizer.from_str(tiny.tokenizer_json(o.vocab - len(further)))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in further])
    return str(tokenizer.to_str())


def pictured(text: Any, sizes: VL, token: int) -> dict[str, Any]:
    """What transformers' model takes: token ids [1, n] with a random picture behind the first five."""
    import torch

    text[0, 5 : 5 + sizes.tokens] = token
    generator, sides = torch.Generator().manual_seed(0), {"pixel_values": sizes.image}
    if sizes.hybrid:
        sides["high_res_pixel_values"] = sizes.sam_image
    pictures = {name: torch.randn(1, 3, side, side, generator=generator) for name, side in sides.items()}
    return {"input_ids": text, **pictures}
