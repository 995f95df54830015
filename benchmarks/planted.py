"""Which planted defects `dsconvert verify` finds in outputs of every type of a real model, and what it says
of faithful ones.

    python benchmarks/planted.py MODEL [--types q4_0,gptq2,exl2_3] [--quick]

MODEL is a checkpoint of Llama's table. Each output is made without its own proof, verified, harmed in one
way after the other by `tests/support/planted.py`, and verified again. A line of the table is an output: the
exit code of the faithful one, and of each defect (3 is right, with the tensor or number named; "3?" is 3 for
a reason that does not name it). At the end stands how many lines are as they should be.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from click.testing import CliRunner, Result

# Ahead of this folder, whose module of this name hides the one of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import harm
from planted import DEFECTS, GRAVEST

from converters.gguf.file_types import MIXTURES
from dsconvert.cli import cli

TEXT = ("--calib", "builtin", "--calib-samples", 16, "--calib-len", 256)
RATES = (2.5, 3.0, 4.0, 6.0)


def outputs() -> Iterator[tuple[str, tuple[object, ...]]]:
    """The name and the command of every output; types that need importance get it."""
    for name in MIXTURES:
        matrix = TEXT if name.startswith(("iq", "q2_k_s")) else ()
        yield name, ("gguf", "-q", name, *matrix)
    for bits in (8, 4, 3, 2):
        yield f"gptq{bits}", ("gptq", "-b", bits, *TEXT)
    for rate in RATES:
        yield f"exl2_{rate:g}", ("exl2", "-b", rate, *TEXT)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--types", type=lambda text: text.split(","))
    parser.add_argument(
        "--quick", action="store_true", help="verify a sample of blocks, as after a conversion"
    )
    asked = parser.parse_args()
    effort = "quick" if asked.quick else "full"
    print("type", "faithful", *GRAVEST, sep=" | ")
    right = lines = 0
    for name, command in outputs():
        if asked.types and name not in asked.types:
            continue
        with tempfile.TemporaryDirectory() as folder:
            cells = table_line(asked.model, command, Path(folder), effort)
        lines += 1
        right += cells == ["0", *["3"] * len(GRAVEST)]
        print(name, *cells, sep=" | ", flush=True)
    print(f"{right} of {lines} as they should be")


def table_line(model: str, command: tuple[object, ...], folder: Path, effort: str) -> list[str]:
    """What verify says of one output: faithful, then with each of the gravest defects."""
    out = folder / ("a.gguf" if command[0] == "gguf" else "a")
    made = run(command[0], model, *command[1:], "-o", out, "--verify", "off")
    if made.exit_code:
        return [f"not made: {made.output.strip()[-120:]!r}"]
    cells = [str(run("verify", out, "--against", model, "--verify", effort).exit_code)]
    for defect in GRAVEST:
        output = harm.read(out)
        DEFECTS[defect].plant(output)
        harmed = output.write(folder / "harmed" / out.name)
        result = run("verify", harmed, "--against", model, "--verify", effort, "--json", "-")
        cells.append(str(result.exit_code) + ("" if named(result, defect) else "?"))
        shutil.rmtree(folder / "harmed")
    return cells


def named(result: Result, defect: str) -> bool:
    """Whether the failed checks name what was planted."""
    if result.exit_code != 3:
        return False
    failed = [check["detail"] for check in json.loads(result.stdout)["checks"] if not check["passed"]]
    return all(any(words in detail for detail in failed) for words in DEFECTS[defect].named)


if __name__ == "__main__":
    main()
