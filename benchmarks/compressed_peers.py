"""compressed-tensors folders of a model in transformers: logits of our reader's, KL of GPTQ's folder.

    python benchmarks/compressed_peers.py MODEL_PATH [--schemes w4a16,...] [--group-size 64] [--samples 8]
                                          [--length 256] [--windows 2]

Of every scheme a folder is made with few calibration windows of the built-in text and loaded by transformers
with the compressed-tensors package, in float32. Its logits on held-out windows are held against those of
transformers' plain model with the weights that our reader gives, rounded as that package rounds them (the
distance, relative to their norm), and both against the checkpoint's (mean KL). Of the widths that GPTQ's
format has, its folder is made too, from the same text: its weights must be equal, and transformers loads it
with gptqmodel's torch kernel, which rounds weights to float16, for the KL of that. It needs what tests/peers
needs. Exit code 1 where a distance is above 1e-5, or weights differ.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from converters.compressed.reader import open_model
from converters.compressed.stated import Weights
from converters.gptq.reader import open_model as open_gptq
from dsconvert.checkpoints.quantized import QuantizedSource
from dsconvert.texts.builtin import evaluation_page

SCHEMES = (
    "w8a16", "w6a16", "w5a16", "w4a16", "w4a16 --asym", "w3a16", "w2a16", "fp8-block", "nvfp4a16",
    "nvfp4a16 --calib", "mxfp4a16", "mxfp4a16 --calib", "--bpw 4.5",
)  # fmt: skip
GPTQ_BITS = (2, 3, 4, 8)
WITHIN = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--group-size", default="64")
    parser.add_argument("--samples", default="8")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=2)
    asked = parser.parse_args()
    text = ["--calib-samples", asked.samples, "--calib-len", str(asked.length)]
    ids = windows(asked.model, asked.windows, asked.length)
    source = logits(load(asked.model), ids)
    print("| scheme | bytes | distance of logits | mean KL | of our reader | of GPTQ's folder |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    wrong = False
    for scheme in asked.schemes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            words = options(scheme, asked.group_size, text)
            run("compressed", asked.model, *words, "--out", str(out))
            model = open_model(out)
            asym = "--asym" in scheme
            four = "fp4" in scheme
            whole = asym or four or scheme.startswith("fp8")
            theirs = logits(load(out, **({"quantization_config": dequantized()} if whole else {})), ids)
            rounded = "float16" if asym else "bfloat16" if four else "float32"
            ours = logits(read_back(asked.model, model, rounded), ids)
            away, other = apart(theirs, ours), ""
            if scheme.startswith("w") and int(scheme[1]) in GPTQ_BITS:
                gptq = Path(folder) / "gptq"
                run("gptq", asked.model, "--bits", scheme[1], *words[2:], "--out", str(gptq))
                equal, values = beside_gptq(gptq, model, ids)
                expected = logits(read_back(asked.model, model, "float16"), ids)
                other = f"{kl(source, values):.5f}" if equal else "other weights"
                wrong |= not equal or apart(values, expected) > WITHIN
            wrong |= away > WITHIN
            size = sum(tensor.nbytes for tensor in model.checkpoint.tensors.values())
            figures = f"{away:.1e} | {kl(source, theirs):.5f} | {kl(source, ours):.5f}"
            print(f"| {scheme} | {size:,} | {figures} | {other} |", flush=True)
    return int(wrong)


def options(scheme: str, group_size: str, text: list[str]) -> list[str]:
    """The command's words for a scheme of the table."""
    words = scheme.split() if scheme.startswith("--") else ["--scheme", *scheme.split()]
    if scheme.startswith(("fp8", "nvfp4", "mxfp4")):
        return [*words, "builtin", *text] if "--calib" in words else words
    return [*words, "--group-size", group_size, "--calib", "builtin", *text]


def run(*words: str) -> None:
    """One run of dsconvert, unproven."""
    command = [sys.executable, "-W", "ignore", "-m", "dsconvert", *words, "--effort", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)


def windows(model: str, count: int, length: int) -> Any:
    """Windows of held-out text, [n, length]."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    ids = tokenizer.encode(evaluation_page(8 * count * length), add_special_tokens=False).ids
    return torch.tensor(ids[: count * length]).view(count, length)


def load(folder: Path | str, **more: Any) -> Any:
    """transformers' model of a folder, in float32."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def dequantized() -> Any:
    """The setting by which the package gives plain weights, where its own forward pass cannot."""
    import transformers

    return transformers.CompressedTensorsConfig(dequantize=True)


def read_back(source: str, model: QuantizedSource[Weights], rounded: str) -> Any:
    """transformers' plain model with the weights of our reader, those of its linears rounded to a type."""
    import torch

    plain = load(source)
    state = plain.state_dict()
    for name in model.shapes():
        tensor = torch.from_numpy(np.ascontiguousarray(model.float32(name)))
        if name.removesuffix(".weight") in model.linears:
            tensor = tensor.to(getattr(torch, rounded))
        state[name].copy_(tensor)
    return plain


def logits(model: Any, ids: Any) -> Any:
    """The logits of the windows, a window at a time: [tokens, vocab]."""
    import torch

    with torch.no_grad():
        return np.concatenate([model(one[None]).logits[0].float().numpy() for one in ids])


def kl(base: Any, other: Any) -> float:
    """The mean KL divergence in nats of each prediction."""
    import torch

    p, q = (torch.from_numpy(x).log_softmax(-1) for x in (base, other))
    return float((p.exp() * (p - q)).sum(-1).double().mean())


def apart(some: Any, others: Any) -> float:
    """The distance of logits, relative to the norm of the others."""
    return float(np.linalg.norm(some - others) / np.linalg.norm(others))


def beside_gptq(folder: Path, model: QuantizedSource[Weights], ids: Any) -> tuple[bool, Any]:
    """Whether GPTQ's folder has the weights of `model`, and its logits."""
    import transformers

    theirs = open_gptq(folder)
    equal = all(np.array_equal(model.float32(name), theirs.float32(name)) for name in model.shapes())
    kernel = transformers.GPTQConfig(next(iter(theirs.linears.values())).settings.bits, backend="torch")
    return equal, logits(load(folder, quantization_config=kernel), ids)


if __name__ == "__main__":
    sys.exit(main())
