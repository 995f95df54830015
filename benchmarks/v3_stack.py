"""Makes a stack of DeepSeek-V3's width in fp8, a dense layer and one of experts; converts and proves it.

    python benchmarks/v3_stack.py FOLDER [--experts 256] [--quant q4_k_m] [--keep]

The weights are random. Prints the seconds and the peak memory of each command: of the process, and of that
what is not pages of mapped files. With 256 experts the folder has 12 GB and its GGUF file 7 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
D, FF, M, HEADS, QL, KL, NOPE, ROPE, VALUE, VOCAB = 7168, 18432, 2048, 128, 1536, 512, 128, 64, 128, 2048
BLOCK = 128
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": D,
    "intermediate_size": FF, "moe_intermediate_size": M, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "kv_lora_rank": KL,
    "q_lora_rank": QL, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE, "qk_nope_head_dim": NOPE, "n_group": 8,
    "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "norm_topk_prob": True,
    "vocab_size": VOCAB, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "tie_word_embeddings": False, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0,
        "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
    },
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    },
}  # fmt: skip


def shapes(experts: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of every tensor."""
    yield "model.embed_tokens.weight", (VOCAB, D), "BF16"
    for i in range(2):
        at = f"model.layers.{i}."
        for name, size in (
            ("input_layernorm", D), ("post_attention_layernorm", D), ("self_attn.q_a_layernorm", QL),
            ("self_attn.kv_a_layernorm", KL),
        ):  # fmt: skip
            yield f"{at}{name}.weight", (size,), "BF16"
        for name, shape in (
            ("q_a_proj", (QL, D)), ("q_b_proj", (HEADS * (NOPE + ROPE), QL)),
            ("kv_a_proj_with_mqa", (KL + ROPE, D)), ("kv_b_proj", (HEADS * (NOPE + VALUE), KL)),
            ("o_proj", (D, HEADS * VALUE)),
        ):  # fmt: skip
            yield f"{at}self_attn.{name}.weight", shape, "F8_E4M3"
        stacks = {"mlp.": FF} if not i else {f"mlp.experts.{e}.": M for e in range(experts)}
        for name, width in {**stacks, **({"mlp.shared_experts.": M} if i else {})}.items():
            for part in ("gate", "up", "down"):
                yield f"{at}{name}{part}_proj.weight", (D, width) if part == "down" else (width, D), "F8_E4M3"
        if i:
            yield f"{at}mlp.gate.weight", (experts, D), "BF16"
            yield f"{at}mlp.gate.e_score_correction_bias", (experts,), "F32"
    yield "model.norm.weight", (D,), "BF16"
    yield "lm_head.weight", (VOCAB, D), "BF16"


def codes(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Random e4m3 codes from 2^-4 to below 2^4, of both signs; a few rows repeated, so that it goes fast."""
    rows = rng.integers(0x18, 0x58, (min(shape[0], 256), shape[1]), np.uint8)
    rows |= rng.integers(0, 2, rows.shape, np.uint8) << 7
    return np.concatenate([np.roll(rows, 7 * i, 1) for i in range(-(-shape[0] // len(rows)))])[: shape[0]]


def data(rng: np.random.Generator, name: str, shape: tuple[int, ...], kind: str) -> bytes:
    if kind == "F8_E4M3":
        return bytes(codes(rng, shape).tobytes())
    if name.endswith("_scale_inv"):
        return bytes((rng.uniform(0.5, 1, shape) / 4 / np.sqrt(shape[1] * BLOCK)).astype("<f4").tobytes())
    values = rng.standard_normal(shape, np.float32)
    values = values * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.1 * values
    if kind == "F32":
        return bytes(values.tobytes())
    return bytes((values.view(np.uint32) >> 16).astype("<u2").tobytes())


def make(folder: Path, experts: int) -> None:
    """Write the checkpoint, one file, tensor by tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (ROOT / "dsconvert" / "sample").iterdir():
        if file.is_file() and "token" in file.name:
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "n_routed_experts": experts}), "utf-8")
    entries, plan, at = {}, list(shapes(experts)), 0
    plan = [
        part
        for name, shape, kind in plan
        for part in (
            ((name, shape, kind), (f"{name}_scale_inv", tuple(-(-n // BLOCK) for n in shape), "F32"))
            if kind == "F8_E4M3"
            else ((name, shape, kind),)
        )
    ]
    for name, shape, kind in plan:
        nbytes = int(np.prod(shape)) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[kind]
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    header = json.dumps(entries).encode()
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, shape, kind in plan:
            file.write(data(rng, name, shape, kind))


def measured(words: list[str]) -> tuple[float, float, float, float, str]:
    """Seconds, processor's seconds, peak GB of the process and of its own memory, and what it said."""
    started, peak = time.monotonic(), [0]
    process = subprocess.Popen(
        [sys.executable, "-m", "dsconvert", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def watch() -> None:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            own = next((line for line in status.splitlines() if line.startswith("RssAnon")), "RssAnon: 0 kB")
            peak[0] = max(peak[0], int(own.split()[1]))
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = process.communicate()[0]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, spent, used.ru_maxrss / 1e6, peak[0] / 1e6, said


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--quant", default="q4_k_m")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and file there")
    given = parser.parse_args()
    model, out = given.folder / "model", given.folder / f"{given.quant}.gguf"
    if not model.exists():
        make(model, given.experts)
    size = (model / "model.safetensors").stat().st_size
    runs = {
        "convert": ["gguf", str(model), "-q", given.quant, "-o", str(out), "--force", "--effort", "off"],
        "quick proof": ["verify", str(out), "--against", str(model), "--effort", "quick"],
        "proof": ["verify", str(out), "--against", str(model), "--windows", "1", "--length", "128"],
    }
    for name, words in runs.items():
        wall, spent, peak, own, said = measured(words)
        print(
            f"{name:<12} {wall:6.1f} s, {spent:6.1f} s of processor, {size / wall / 1e6:6.0f} MB/s; "
            f"peak {peak:.2f} GB, without mapped pages {own:.2f} GB; {said.strip().splitlines()[-1]}",
            flush=True,
        )
    if not given.keep:
        shutil.rmtree(given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
