"""What `dsconvert verify` says of outputs of every type of a real model: of faithful ones, and of the gravest
defects planted in them.

    python benchmarks/planted.py MODEL [--types q4_0,gptq2,exl2_3] [--keep FOLDER] [--quick]
                                 [--windows N] [--length N] [--calib-samples N] [--calib-len N] [--faithful]

MODEL is a checkpoint of Llama's table. GGUF mixtures are made, also by importance ("q4_k_m by importance"),
GPTQ folders of 8 to 2 bits and EXL2 folders of 6 to 2.5, without their own proofs; into FOLDER they are made
once and used again. Each is verified as it is, harmed in one way after the other by
`tests/support/planted.py`, and verified again. A line of the table is an output:

- the exit code of the faithful one (0 is right), its mean KLD, and that by what its weights' errors foretell;
- of each defect the exit code (3 is right; "3?" is 3 for a reason that does not name it) and, where the
  models are run, the mean KLD by what is foretold; "-" behind it says that the check of that did not fail,
  and others alone found the defect.

At the end stands how many lines are as they should be.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

# Ahead of this folder, whose module of this name hides the one of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import harm
from planted import DEFECTS, GRAVEST

from converters.gguf.file_types import MIXTURES
from dsconvert.cli import cli

BITS, RATES = (8, 4, 3, 2), (6.0, 5.0, 4.0, 3.0, 2.5)
STORED = ("f32", "f16", "bf16")  # no importance counts there
WEIGHTED = " by importance"


@dataclass(frozen=True)
class Batch:
    """Outputs by name that one command makes, and its arguments behind the model."""

    names: dict[str, Path]
    arguments: tuple[object, ...]


def batches(folder: Path, wanted: list[str] | None, text: tuple[object, ...]) -> Iterator[Batch]:
    """The commands that make the outputs asked for into `folder`, all of them by default."""

    def chosen(names: dict[str, Path]) -> dict[str, Path]:
        return {name: path for name, path in names.items() if wanted is None or name in wanted}

    needy = [name for name in MIXTURES if name.startswith("iq") or name == "q2_k_s"]
    plain = {name: folder / "plain" / f"a-{name}.gguf" for name in MIXTURES if name not in needy}
    weighted = {
        name if name in needy else name + WEIGHTED: folder / "weighted" / f"a-{name}.gguf"
        for name in MIXTURES
        if name not in STORED
    }
    for names, calibrated in ((chosen(plain), ()), (chosen(weighted), text)):
        if names:
            # A dummy with the first keeps the files' names those of several.
            quants = dict.fromkeys(name.removesuffix(WEIGHTED) for name in names)
            out = next(iter(names.values())).parent / "a.gguf"
            yield Batch(names, ("gguf", "-q", ",".join(quants), *calibrated, "--no-mmproj", "-o", out))
    for bits in BITS:
        if names := chosen({f"gptq{bits}": folder / f"gptq{bits}"}):
            yield Batch(names, ("gptq", "-b", bits, *text, "-o", *names.values()))
    for rate in RATES:
        if names := chosen({f"exl2_{rate:g}": folder / f"exl2_{rate:g}"}):
            yield Batch(names, ("exl2", "-b", rate, *text, "-o", *names.values()))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def make(model: str, batch: Batch) -> None:
    """Make what is not there; ends the program where that fails."""
    if all(path.exists() for path in batch.names.values()):
        return
    command, *others = batch.arguments
    target = Path(str(others[-1]))
    target.parent.mkdir(parents=True, exist_ok=True)
    made = run(command, model, *others, "--effort", "off", "--force")
    if made.exit_code:
        sys.exit(f"{', '.join(batch.names)} not made: {made.output.strip()[-500:]}")
    if target.is_file():  # of one type alone
        target.rename(next(iter(batch.names.values())))


@dataclass(frozen=True)
class Said:
    """What verify said of an output: its exit code and its checks by name."""

    code: int
    checks: list[dict[str, Any]]
    output: str

    def cell(self) -> str:
        """The mean KLD by what is foretold, "-" behind it where that passes."""
        for check in self.checks:
            if check["name"] == "foretold KLD":
                return f" {check['value']:.3g}{'-' if check['passed'] else ''}"
        return ""

    def names(self, words: list[str]) -> bool:
        """Whether each of the words is in what a failed check says."""
        failed = [check["detail"] for check in self.checks if not check["passed"]]
        return all(any(word in detail for detail in failed) for word in words)


def verify(out: Path, model: str, options: tuple[object, ...]) -> Said:
    result = run("verify", out, "--against", model, *options, "--json", "-")
    found = json.loads(result.stdout) if result.exit_code in (0, 3) else {"checks": []}
    return Said(result.exit_code, found["checks"], result.output)


def line(
    name: str, out: Path, model: str, options: tuple[object, ...], defects: tuple[str, ...] = GRAVEST
) -> bool:
    """Print what verify says of one output, faithful and harmed; whether it is as it should be."""
    said = verify(out, model, options)
    kld = next((f"{check['value']:.3g}" for check in said.checks if check["name"] == "mean KLD"), "")
    cells, right = [str(said.code), kld, said.cell().strip(" -")], said.code == 0
    for defect in defects:
        output = harm.read(out)
        layers = output.layers
        DEFECTS[defect].plant(output)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            harmed = verify(output.write(Path(folder) / out.name), model, options)
        named = harmed.code == 3 and harmed.names(DEFECTS[defect].words(layers))
        right = right and named
        cells.append(f"{harmed.code}{'' if named else '?'}{harmed.cell()}")
    print(name, *cells, sep=" | ", flush=True)
    if said.code:
        print(said.output.strip()[-2000:], file=sys.stderr)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--types", type=lambda text: text.split(","))
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--quick", action="store_true", help="verify as after a conversion")
    parser.add_argument("--faithful", action="store_true", help="plant nothing")
    for option, default in (("windows", 8), ("length", 512), ("calib-samples", 16), ("calib-len", 256)):
        parser.add_argument("--" + option, type=int, default=default)
    asked = parser.parse_args()
    text = ("--calib", "builtin", "--calib-samples", asked.calib_samples, "--calib-len", asked.calib_len)
    options = ("--effort", "quick" if asked.quick else "full", "--windows", asked.windows,
               "--length", asked.length)  # fmt: skip
    folder = asked.keep or Path(tempfile.mkdtemp())
    defects = () if asked.faithful else GRAVEST
    print("type", "faithful", "mean KLD", "by foretold", *defects, sep=" | ", flush=True)
    right = []
    try:
        for batch in batches(folder, asked.types, text):
            make(asked.model, batch)
            right += [line(name, out, asked.model, options, defects) for name, out in batch.names.items()]
    finally:
        if asked.keep is None:
            shutil.rmtree(folder)
    print(f"{sum(right)} of {len(right)} as they should be")


if __name__ == "__main__":
    main()
