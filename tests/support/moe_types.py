"""The shapes of models with experts and latent attention, and digests of the types that llama.cpp gave them.

`moe_types.json` holds both; benchmarks/moe_types.py makes the digests with llama.cpp's own quantizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("moe_types.json")
Shapes = dict[str, tuple[int, ...]]


def load() -> dict[str, Any]:
    """`cases` by name, each with its sizes; `types` by case and mixture, each a digest."""
    found: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    return found


def save(found: Mapping[str, Any]) -> None:
    """Write what `load` gives, one line to a case."""
    parts = [
        f'"{part}": {{\n'
        + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found[part].items())
        + "\n}"
        for part in ("cases", "types")
    ]
    FILE.write_text("{" + ",\n".join(parts) + "}\n", "utf-8")


def digest(types: Mapping[str, str]) -> str:
    """Of the types of all tensors by name."""
    text = "\n".join(f"{name} {types[name]}" for name in sorted(types))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shapes(case: Mapping[str, Any], rows: int = 2) -> Shapes:
    """The matrices of a file, with true row lengths, `rows` rows each and two experts or heads in stacks."""
    d = case["embedding"]
    found: Shapes = {"token_embd.weight": (rows, d), "output_norm.weight": (d,)}
    if not case["tied"]:
        found["output.weight"] = (rows, d)
    for i in range(case["layers"]):
        layer = {"attn_norm": (d,), "ffn_norm": (d,), **attention(case, rows), **mlp(case, i, rows)}
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        if case.get("gating") == "sigmoid" and "ffn_gate_inp" in layer:
            found[f"blk.{i}.exp_probs_b.bias"] = (case["experts"],)
    return found


def attention(case: Mapping[str, Any], rows: int) -> Shapes:
    """The matrices of attention, with those of the indexer where there is one."""
    d, heads = case["embedding"], case["heads"]
    if "kv_lora" not in case:
        head = case.get("head_dim", d // heads)
        return {f"attn_{name}": (rows, d) for name in "qkv"} | {"attn_output": (rows, heads * head)}
    latent, value = case["kv_lora"], case["v_head"]
    found: Shapes = {
        "attn_kv_a_mqa": (rows, d),
        "attn_k_b": (2, rows, case["qk_nope"]),
        "attn_v_b": (2, rows, latent),
        "attn_output": (rows, heads * value),
    }
    if "q_lora" in case:
        found |= {"attn_q_a": (rows, d), "attn_q_b": (rows, case["q_lora"])}
    else:
        found["attn_q"] = (rows, d)
    if "index_dim" in case:
        found |= {
            "indexer.attn_q_b": (rows, case["q_lora"]),
            "indexer.attn_k": (rows, d),
            "indexer.proj": (rows, d),
        }
    return found


def mlp(case: Mapping[str, Any], layer: int, rows: int) -> Shapes:
    """The matrices of the MLP, or of the router and the experts."""
    d = case["embedding"]

    def gated(end: str, size: int, *stack: int) -> Shapes:
        found = {f"ffn_{name}{end}": (*stack, rows, d) for name in ("gate", "up")}
        return found | {f"ffn_down{end}": (*stack, rows, size)}

    if layer < case.get("leading_dense", 0) or "experts" not in case:
        return gated("", case["feed_forward"])
    m, shared = case["moe_feed_forward"], case.get("shared_experts", 0)
    found = {"ffn_gate_inp": (rows, d)} | gated("_exps", m, 2)
    return found | (gated("_shexp", m * shared) if shared else {})
