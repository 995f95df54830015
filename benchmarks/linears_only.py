"""Mean KL of the linears alone at equal bits: GGUF's k-quants, EXL2 and GPTQ, with the same calibration.

    python benchmarks/linears_only.py [MODEL_PATH] [--draws 2] [--samples 24] [--length 512] [--windows 48]

Embedding and head stay in 16 bits everywhere. Of GGUF files all linears have one type, by importance and by
error feedback with two rounds, or types by knapsack with feedback in as many bytes. EXL2 gets the bits of
each type, GPTQ groups of 32 and 64. Bits per weight are those of the linears' bytes. Text and figures are
those of better_gguf.py.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import better_gguf
import calibrated
import numpy as np

from converters.exl2.convert import convert as convert_exl2
from converters.gguf.convert import convert
from converters.gptq.convert import convert as convert_gptq
from converters.outputs import open_output, open_reference
from dsconvert.proof import compare
from dsconvert.proof.sources import Reference
from dsconvert.quantization.budget import Budget
from dsconvert.texts.windows import Windows

KEPT = (("^token_embd\\.weight$", "f16"), ("^output\\.weight$", "f16"))
PLAIN = ("f32", "f16", "bf16")


def outputs(model: str, folder: Path, text: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """Make every output; yields its name in the table and its path."""

    def gguf(name: str, quant: str, **more: Any) -> tuple[str, Path]:
        out = folder / f"{name.replace(' ', '-')}.gguf"
        options = calibrated.gguf_options(
            model, quant, out=out, effort="off", force=True, overrides=KEPT, **text, **more
        )
        for _ in convert(options):
            pass
        return name, out

    def other(name: str, run: Iterator[object], out: Path) -> tuple[str, Path]:
        for _ in run:
            pass
        return name, out

    for kind in ("q4_k", "q3_k"):
        mixture = f"{kind}_s"
        name, path = gguf(f"{kind} importance", mixture, pure=True, solver="imatrix")
        yield name, path
        yield gguf(f"{kind} feedback, 2 rounds", mixture, pure=True, rounds=2)
        size = path.stat().st_size
        yield gguf(f"knapsack and feedback, size of {kind}", mixture, rounds=2, budget=Budget(size=size))
        bits = 4.5 if kind == "q4_k" else 3.4375
        out = folder / f"exl2-{bits}"
        options = calibrated.exl2_options(model, bpw=bits, head_bits=16, out=out, effort="off", **text)
        yield other(f"exl2 {bits}", convert_exl2(options), out)
    for bits, size in ((4, 32), (3, 64)):
        out = folder / f"gptq-{bits}-{size}"
        options = calibrated.gptq_options(model, bits=bits, group_size=size, out=out, effort="off", **text)
        yield other(f"gptq {bits} bits, groups of {size}", convert_gptq(options), out)


def figures(reference: Reference, path: Path, windows: Windows) -> tuple[float, float, float]:
    """Bits per weight of an output's linears, its mean KL divergence and its share of same top tokens."""
    opened = open_output(path)
    run = compare.compare(
        reference.source, opened.source, reference.config, windows, candidate_config=opened.config
    )
    found = compare.result(run).figures
    assert found is not None
    linears = [size for size in opened.sizes if size.type not in PLAIN]
    bits = 8 * sum(size.nbytes for size in linears) / sum(size.weights for size in linears)
    return bits, found.kld.value, found.same_top.value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="sample:")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=48)
    asked = parser.parse_args()
    reference = open_reference(asked.model)
    windows = better_gguf.evaluation(reference, asked.windows)
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(asked.draws):
        text = {"calib": "builtin", "calib_samples": asked.samples, "calib_len": asked.length, "seed": seed}
        with tempfile.TemporaryDirectory() as temporary:
            for name, path in outputs(asked.model, Path(temporary), text):
                rows.setdefault(name, []).append(figures(reference, path, windows))
                print("#", seed, name, rows[name][-1], flush=True)
    print("| linears | bits per weight | mean KL | same top token |\n|---|---:|---:|---:|")
    for name, found in rows.items():
        bits, kld, top = np.mean(found, 0)
        print(f"| {name} | {bits:.3f} | {kld:.5f} | {top:.1%} |")


if __name__ == "__main__":
    main()
