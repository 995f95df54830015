"""Asks llama.cpp's own quantizer for the type of every tensor of models with experts and latent attention.

    python benchmarks/moe_types.py [--package FOLDER] [--write]

For each shape of tests/support/moe_types.json a float16 GGUF file of true row lengths, with two rows and two
experts in each tensor, goes through llama_model_quantize in every mixture, with an importance matrix of ones
where one is needed. Compares the types with the digests in that file, or writes them. Exit code 1 when any
differs. See llama_quantize.py for the libraries.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path[0] = str(Path(__file__).parents[1])
sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

import moe_types  # noqa: E402

from benchmarks.llama_quantize import quantize  # noqa: E402
from converters.gguf.file_types import MIXTURES  # noqa: E402
from converters.gguf.importance_file import save  # noqa: E402
from converters.gguf.layout import Tensor, lay_out  # noqa: E402
from converters.gguf.mixtures import is_quantized, needs_importance  # noqa: E402
from converters.gguf.parse import open_gguf  # noqa: E402
from converters.gguf.qtypes import QTYPES  # noqa: E402


def keys(case: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """What llama.cpp asks of a file of this shape."""
    arch, latent = case["arch"], "kv_lora" in case
    numbers: dict[str, Any] = {
        "block_count": case["layers"],
        "context_length": 4096,
        "embedding_length": case["embedding"],
        "feed_forward_length": case["feed_forward"],
        "attention.head_count": case["heads"],
        "attention.head_count_kv": 1 if latent else case["kv_heads"],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "vocab_size": 2,
        "expert_count": case.get("experts"),
        "expert_used_count": case.get("experts_used"),
        "expert_feed_forward_length": case.get("moe_feed_forward"),
        "expert_shared_count": case.get("shared_experts"),
        "leading_dense_block_count": case.get("leading_dense"),
        "attention.key_length": case["kv_lora"] + case["qk_rope"] if latent else case.get("head_dim"),
        "attention.value_length": case["kv_lora"] if latent else case.get("head_dim"),
        "attention.q_lora_rank": case.get("q_lora"),
        "attention.kv_lora_rank": case.get("kv_lora"),
        "attention.key_length_mla": case["qk_nope"] + case["qk_rope"] if latent else None,
        "attention.value_length_mla": case.get("v_head"),
        "rope.dimension_count": case.get("qk_rope"),
        "attention.indexer.head_count": case.get("index_heads"),
        "attention.indexer.key_length": case.get("index_dim"),
        "attention.indexer.top_k": 2048 if "index_dim" in case else None,
        "expert_weights_scale": 1.0 if "experts" in case else None,
    }
    if "experts" in case:
        numbers["expert_gating_func"] = 2 if case.get("gating") == "sigmoid" else 1
    typed = {
        k: ("float32" if isinstance(v, float) else "uint32", v) for k, v in numbers.items() if v is not None
    }
    return {"general.architecture": ("string", arch), **{f"{arch}.{k}": v for k, v in typed.items()}}


def write(path: Path, case: Mapping[str, Any]) -> None:
    """A file of the case with zeros in all tensors."""
    found = moe_types.shapes(case)
    tensors = [Tensor(n, s, QTYPES["f16" if is_quantized(n, s) else "f32"]) for n, s in found.items()]
    layout = lay_out(path.name, keys(case), tensors)
    with path.open("wb") as file:
        file.write(layout.head)
        file.truncate(layout.nbytes)


def write_matrix(path: Path, case: Mapping[str, Any]) -> None:
    """An importance matrix of ones for all of the case's matrices."""
    entries: dict[str, Any] = {}
    for name, shape in moe_types.shapes(case).items():
        experts = shape[0] if len(shape) > 2 else 1
        entries[f"{name}.in_sum2"] = np.ones((experts, shape[-1]), np.float32)
        entries[f"{name}.counts"] = np.ones((experts, 1), np.float32)
    save(path, {"general.type": ("string", "imatrix")}, entries, force=True)


def asked(folder: Path, case: Mapping[str, Any], quants: list[str], package: Path | None) -> dict[str, str]:
    """The digest of each mixture's types."""
    source, out, matrix = (folder / f"{name}.gguf" for name in ("source", "out", "matrix"))
    write(source, case)
    write_matrix(matrix, case)
    found = {}
    for quant in quants:
        quantize(source, out, quant, 1, package, matrix if needs_importance(quant) else None)
        found[quant] = moe_types.digest({n: t.qtype.name for n, t in open_gguf(out).tensors.items()})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", type=Path, help="folder of the unpacked npm package")
    parser.add_argument("--write", action="store_true", help="write the digests instead of comparing them")
    given = parser.parse_args()
    known = moe_types.load()
    quants = [name for name, m in MIXTURES.items() if QTYPES[m.default].block > 1 and name != "nvfp4"]
    failed, types = 0, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in known["cases"].items():
            types[name] = asked(Path(folder), case, quants, given.package)
            differ = [q for q in quants if known["types"].get(name, {}).get(q) != types[name][q]]
            failed += len(differ)
            print(f"{name:<24} {len(quants)} mixtures, {len(differ)} differ", *differ[:3], flush=True)
    if given.write:
        moe_types.save({"cases": known["cases"], "types": types})
    return 1 if failed and not given.write else 0


if __name__ == "__main__":
    sys.exit(main())
