"""Commands on the embedded samples whose outputs stay the same bytes, whatever moves in the code.

    python tests/support/outputs.py PLAIN|CALIBRATED OUT.json [--checkout FOLDER]    write the digests of the
    outputs

PLAIN outputs are the same on every processor: kernels give ggml's bytes and nothing is summed in an order
that a library chooses. CALIBRATED ones go through torch's products, which differ from processor to processor;
of two checkouts on one machine they are the same (`benchmarks/same_outputs.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MIXTURES = "f32,f16,bf16,q8_0,q4_0,q4_1,q5_0,q5_1,q2_k,q3_k_s,q3_k_m,q3_k_l,q4_k_s,q4_k_m,q5_k_s,q5_k_m,q6_k"
FEW_BITS = "iq4_nl,iq4_xs,iq3_m,iq3_s,tq1_0,tq2_0,mxfp4_moe"
TEXT = ("--calib", "builtin", "--calib-samples", "8", "--calib-len", "128")
PLAIN: dict[str, tuple[str, ...]] = {
    "mixtures": ("gguf", "sample:", "-q", MIXTURES, "-o", "OUT/sample.gguf"),
    "few bits": ("gguf", "sample:", "-q", FEW_BITS, "-o", "OUT/sample.gguf"),
    "pure": ("gguf", "sample:", "-q", "q4_k_m", "--pure", "-o", "OUT/sample.gguf"),
    "split": ("gguf", "sample:", "-q", "q8_0", "--split-max-size", "1M", "-o", "OUT/sample.gguf"),
    "tensor types": ("gguf", "sample:", "--tensor-type", "ffn_down=q6_k", "-o", "OUT/sample.gguf"),
    "pictures f16": ("gguf", "sample-vl:", "-q", "q4_0", "-o", "OUT/vl.gguf"),
    "pictures q8_0": ("gguf", "sample-vl:", "-q", "q4_k_m", "--mmproj-quant", "q8_0", "-o", "OUT/vl.gguf"),
    "pictures bf16": ("gguf", "sample-vl:", "--mmproj-quant", "bf16", "-o", "OUT/vl.gguf"),
}
CALIBRATED: dict[str, tuple[str, ...]] = {
    "imatrix": ("imatrix", "sample:", *TEXT, "-o", "OUT/imatrix.gguf"),
    "weighted": ("gguf", "sample:", "-q", "q2_k,q3_k_m,q4_k_m,q4_0", *TEXT, "-o", "OUT/sample.gguf"),
    "weighted few bits": (
        "gguf",
        "sample:",
        "-q",
        "iq4_xs,iq3_xxs,iq2_s,iq2_xxs",
        *TEXT,
        "-o",
        "OUT/sample.gguf",
    ),
    "weighted pictures": ("gguf", "sample-vl:", "-q", "q4_k_m", *TEXT, "-o", "OUT/vl.gguf"),
    **{
        f"gptq {options}": ("gptq", "sample:", *options.split(), *TEXT, "-o", "OUT/folder")
        for options in (
            "--bits 4",
            "--bits 2 --group-size 64",
            "--bits 3 --asym",
            "--bits 8 --group-size -1",
            "--bits 4 --no-act-order --no-mse",
            "--bits 4 --dynamic-groups",
            "--bits 4 --lm-head",
        )
    },
    "gptq pictures": ("gptq", "sample-vl:", *TEXT, "-o", "OUT/folder"),
    "gptq language": ("gptq", "sample-vl:", "--language-only", *TEXT, "-o", "OUT/folder"),
    **{
        f"exl2 {rate}": ("exl2", "sample:", "--bpw", rate, *TEXT, "-o", "OUT/folder")
        for rate in ("2.5", "4.0", "6.0")
    },
    "exl2 head": ("exl2", "sample:", "--bpw", "4", "--head-bits", "16", *TEXT, "-o", "OUT/folder"),
    "exl2 pictures": ("exl2", "sample-vl:", "--bpw", "5", *TEXT, "-o", "OUT/folder"),
}
TABLES: Mapping[str, Mapping[str, tuple[str, ...]]] = {"PLAIN": PLAIN, "CALIBRATED": CALIBRATED}


def digests(commands: Mapping[str, tuple[str, ...]], checkout: Path = ROOT) -> Iterator[tuple[str, str]]:
    """The sha256 of every file that the commands write, by "command: file", run on the code of `checkout`."""
    variables = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    for name, command in commands.items():
        with tempfile.TemporaryDirectory() as folder:
            words = [word.replace("OUT/", f"{folder}/") for word in command]
            asked = [] if command[0] == "imatrix" else ["--effort", "off"]
            subprocess.run(
                [sys.executable, "-m", "dsconvert", *words, *asked, "--quiet"],
                env=variables, cwd=folder, check=True,
            )  # fmt: skip
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    yield f"{name}: {path.relative_to(folder)}", digest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkout", type=Path, default=ROOT)
    asked = parser.parse_args()
    found = dict(digests(TABLES[asked.table], asked.checkout.resolve()))
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
