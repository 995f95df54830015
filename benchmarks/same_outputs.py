"""Whether another checkout makes the same outputs, to the byte: every mixture, matrix, GPTQ and EXL2 setting.

    python benchmarks/same_outputs.py OTHER_CHECKOUT [--only plain|calibrated]

Runs the commands of tests/support/outputs.py on the embedded samples with the code of both checkouts, in this
environment, and compares the sha256 of every file. Exit code 1 when any differs or is missing. About five
minutes for each checkout on one core.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import outputs  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path)
    parser.add_argument("--only", choices=("plain", "calibrated"))
    asked = parser.parse_args()
    differ = 0
    for name, commands in outputs.TABLES.items():
        if asked.only in (None, name.lower()):
            ours, theirs = (dict(outputs.digests(commands, place)) for place in (ROOT, asked.other.resolve()))
            wrong = [file for file in sorted({*ours, *theirs}) if ours.get(file) != theirs.get(file)]
            print(f"{name.lower()}: {len(ours)} files, {len(wrong)} differ", *wrong, sep="\n  ", flush=True)
            differ += len(wrong)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
