"""Makes tiny checkpoints: random weights in the Llama layout, as a trainer would have saved them.

The weights are random, the tokenizer is trained; nothing is downloaded and every run gives the same bytes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Rope = Literal["old", "new", "linear"]

BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
# The bytes that never occur in UTF-8, as byte-level BPE spells them: DeepSeek's added, non-special tokens.
BYTE_LIKE = "\xf8\xf6\xfa\xff\xf5\xf7\xfb\xfd\xc0\xf9\xc1\xfe\xfc"
# The pre-tokenizer steps of deepseek-coder, which need no long letter class.
SPLITS = ("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")
NUMPY = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "U8": "<u1", "I8": "<i1"}


@dataclass(frozen=True)
class Tiny:
    """The sizes and the form of a tiny checkpoint; `shards` above 1 brings an index."""

    layers: int = 2
    d: int = 64
    ff: int = 160
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 512
    tied: bool = False
    dtype: Literal["bf16", "f16", "f32"] = "bf16"
    format: Literal["safetensors", "bin"] = "safetensors"
    shards: int = 1
    rope: Rope = "new"
    bias: bool = False
    tokenizer: bool = True
    seed: int = 0


def tiny_checkpoint(folder: Path, options: Tiny | None = None, /, **changes: Any) -> Path:
    """Write a tiny checkpoint into `folder` (made if need be) and give the folder back.

    Options are a Tiny, or its fields: `tiny_checkpoint(path, layers=1, dtype="f16")`.
    """
    options = options or Tiny(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", tiny_config(options))
    stored = {name: encode(value, options.dtype) for name, value in tiny_tensors(options).items()}
    write_weights(folder, stored, options)
    if options.tokenizer:
        write_tokenizer(folder, options.vocab)
    return folder


def tiny_config(options: Tiny) -> dict[str, Any]:
    """config.json of the tiny model, with the RoPE keys of old or of new transformers versions."""
    rope: dict[Rope, dict[str, Any]] = {
        "old": {"rope_theta": 10000.0, "rope_scaling": None},
        "linear": {"rope_theta": 100000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        "new": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": options.d,
        "intermediate_size": options.ff,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "vocab_size": options.vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": options.bias,
        "mlp_bias": options.bias,
        "tie_word_embeddings": options.tied,
        "torch_dtype": {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[options.dtype],
        **rope[options.rope],
    }


def tiny_tensors(options: Tiny) -> dict[str, npt.NDArray[np.float32]]:
    """Float32 weights by Hugging Face name: normal of deviation 0.05, norms near 1."""
    rng = np.random.default_rng(options.seed)
    return {
        name: (
            1 + 0.1 * rng.standard_normal(shape) if "norm" in name else 0.05 * rng.standard_normal(shape)
        ).astype(np.float32)
        for name, shape in tiny_shapes(options).items()
    }


def tiny_shapes(options: Tiny) -> dict[str, tuple[int, ...]]:
    """Names and shapes, in the order in which transformers saves them."""
    d, ff, kv = options.d, options.ff, options.d // options.heads * options.kv_heads
    linears = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (ff, d),
        "mlp.up_proj": (ff, d),
        "mlp.down_proj": (d, ff),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (options.vocab, d)}
    for i in range(options.layers):
        for name, shape in linears.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
            if options.bias:
                shapes[f"model.layers.{i}.{name}.bias"] = shape[:1]
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (d,)
        shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (d,)
    shapes["model.norm.weight"] = (d,)
    if not options.tied:
        shapes["lm_head.weight"] = (options.vocab, d)
    return shapes


def encode(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """Float32 to its stored form: uint16 bits rounded to nearest even (bf16), float16 or float32."""
    if dtype != "bf16":
        return values.astype({"f16": np.float16, "f32": np.float32}[dtype])
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(stored: Array) -> npt.NDArray[np.float32]:
    """The float32 values of what `encode` gave."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def safetensors_bytes(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file: uint16 arrays are written as BF16, the header padded to 8 bytes."""
    kinds = {np.dtype(kind): name for name, kind in NUMPY.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    begin = 0
    for name, value in tensors.items():
        end = begin + value.nbytes
        header[name] = {"dtype": kinds[value.dtype], "shape": value.shape, "data_offsets": [begin, end]}
        begin = end
    return with_header(header, b"".join(value.tobytes() for value in tensors.values()))


def with_header(header: object, data: bytes) -> bytes:
    """The bytes of a safetensors file with this header (an object for JSON, or text) and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON in UTF-8."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), "utf-8")


def write_bin(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write the tensors as torch.save does; uint16 arrays as bfloat16."""
    import torch

    state = {}
    for name, value in tensors.items():
        bits = torch.from_numpy(value.view(np.int16) if value.dtype == np.uint16 else value)
        state[name] = bits.view(torch.bfloat16) if value.dtype == np.uint16 else bits
    torch.save(state, path)


def write_weights(folder: Path, stored: Mapping[str, Array], options: Tiny) -> None:
    """Write the tensors as weight files: in the format and the number of shards of `options`."""
    stem, ending = ("model", "safetensors") if options.format == "safetensors" else ("pytorch_model", "bin")
    names = list(stored)
    parts = [names[i :: options.shards] for i in range(options.shards)]
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        number_of = f"-{number:05d}-of-{options.shards:05d}" if options.shards > 1 else ""
        path = folder / f"{stem}{number_of}.{ending}"
        tensors = {name: stored[name] for name in part}
        if options.format == "safetensors":
            path.write_bytes(safetensors_bytes(tensors))
        else:
            write_bin(path, tensors)
        weight_map |= dict.fromkeys(part, path.name)
    if options.shards > 1:
        total = sum(value.nbytes for value in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: weight_map[name] for name in names}}
        write_json(folder / f"{stem}.{ending}.index.json", index)


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json with fewer tokens than rows."""
    from tokenizers import Tokenizer

    text = tokenizer_json(vocab)
    (folder / "tokenizer.json").write_text(text, "utf-8")
    tokenizer = Tokenizer.from_str(text)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
            "tokenizer_class": "LlamaTokenizerFast",
        },
    )
    write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})


@functools.cache
def tokenizer_json(vocab: int) -> str:
    """A byte-level BPE tokenizer in DeepSeek's form, trained on a few stdlib help texts.

    `vocab` rows hold the BPE tokens, BOS, EOS, the 13 byte-like tokens, and at least one unused row.
    """
    import pydoc_data.topics

    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    added = [AddedToken(token, special=True, normalized=True) for token in (BOS, EOS)]
    added += [AddedToken(token, special=False, normalized=True) for token in BYTE_LIKE]
    size = vocab - len(added) - 1
    if size < 256:
        raise ValueError(f"a byte-level vocabulary needs at least {256 + len(added) + 1} rows")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The trainer's alphabet holds the 13 byte-like characters too; the model's own rows stand for them,
    # so they are added afterwards only where the alphabet lacks them.
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c not in BYTE_LIKE]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(alphabet), show_progress=False)
    topics = pydoc_data.topics.topics
    tokenizer.train_from_iterator([topics[key] for key in sorted(topics)[:24]], trainer)
    tokenizer.add_special_tokens(added[:2])
    tokenizer.add_tokens(added[2:])
    return str(tokenizer.to_str())
