"""Defects planted in the bytes of files and folders of a random model of four blocks: named, exit code 3."""

from __future__ import annotations

import json
from pathlib import Path

import harm
import pytest
from click.testing import CliRunner, Result
from planted import DEFECTS, GRAVEST
from tiny import tiny_checkpoint
from tiny_families import FAMILIES, checkpoint

from converters.gguf.file_types import MIXTURES
from dsconvert.cli import cli

pytest.importorskip("torch")
LAYERS = 4
SHORT = ("--calib-samples", 4, "--calib-len", 128)
OFF = ("--verify", "off")
# How every kind of output is made, by its name: the command, and what its option asks for.
GGUF = {name: ("gguf", "-q", name) for name in MIXTURES}
GPTQ = {f"gptq {bits}": ("gptq", "-b", bits) for bits in (8, 4, 3, 2)}
# 2.45 is about the least that a model of this width can have: its scales weigh .4 bits of every weight.
EXL2 = {f"exl2 {bits}": ("exl2", "-b", bits) for bits in (2.5, 3.5, 4.5, 6.0, 8.0)}
OUTPUTS = {**GGUF, **GPTQ, **EXL2}
# What two bits hide: 5 % of a row's length is less than the lengths of faithful rows differ by.
HIDDEN = {"gptq 2": ("a row times 1.05",)}
FEW = ("q8_0", "q4_k_m", "q3_k_s", "q2_k", "gptq 2")
SLOW = ("q3_k_s", "gptq 2")  # of the many defects
# One of each kind of type; the others are the slow tests'.
OFTEN = (
    *FEW,
    "bf16",
    "q4_0",
    "q5_1",
    "iq4_xs",
    "iq3_xxs",
    "iq2_xs",
    "tq2_0",
    "gptq 4",
    "exl2 3.5",
    "exl2 6.0",
)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "model", layers=LAYERS, d=256, ff=512)


def converted(model: Path, name: str, folder: Path) -> Path:
    """The model as one of OUTPUTS."""
    kind, option, value = OUTPUTS[name]
    calib = ("--calib", "builtin", *SHORT) if kind != "gguf" or name.startswith(("iq", "q2_k_s")) else ()
    out = folder / ("a.gguf" if kind == "gguf" else "a")
    made = command(kind, model, option, value, *calib, *OFF, "-o", out)
    assert made.exit_code == 0, made.output
    return out


def verify(model: Path, output: Path) -> Result:
    return command("verify", output, "--against", model, "--windows", 1, "--length", 128, "--json", "-")


def unnamed(result: Result, name: str) -> list[str]:
    """What the failed checks do not name of a defect, each as one line; none if all is as it should be."""
    if result.exit_code != 3:
        return [f"{name}: exit code {result.exit_code}\n{result.output[-500:]}"]
    failed = [check["detail"] for check in json.loads(result.stdout)["checks"] if not check["passed"]]
    missed = [words for words in DEFECTS[name].words(LAYERS) if not any(words in detail for detail in failed)]
    return [f"{name}: {words!r} is not in {failed}" for words in missed]


@pytest.mark.parametrize(
    "quant", [*OFTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in OUTPUTS if name not in OFTEN)]
)
def test_the_gravest_are_named_in_every_type_and_a_faithful_output_passes(
    model: Path, tmp_path: Path, quant: str
) -> None:
    output = converted(model, quant, tmp_path)
    result = verify(model, output)
    assert result.exit_code == 0, result.output
    missed = []
    for name in GRAVEST:
        harmed = harm.read(output)
        DEFECTS[name].plant(harmed)
        missed += unnamed(verify(model, harmed.write(tmp_path / "harmed" / output.name)), name)
    assert not missed, "\n".join(missed)


@pytest.mark.parametrize(
    "quant", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FEW]
)
def test_every_defect_is_named(model: Path, tmp_path: Path, quant: str) -> None:
    output, missed = converted(model, quant, tmp_path), []
    for name, defect in DEFECTS.items():
        harmed = harm.read(output)
        if name not in HIDDEN.get(quant, ()) and defect.plant(harmed) is not False:
            missed += unnamed(verify(model, harmed.write(tmp_path / "harmed" / output.name)), name)
    assert not missed, "\n".join(missed)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llama"}))
def test_faithful_outputs_of_every_architecture_pass(tmp_path: Path, family: str) -> None:
    """In a few types: `benchmarks/planted.py` makes them all."""
    model = checkpoint(tmp_path / "model", family)
    for number, quant in enumerate((*FEW, "iq3_xxs", "exl2 3.5")):
        folder = tmp_path / str(number)
        folder.mkdir()
        result = verify(model, converted(model, quant, folder))
        assert result.exit_code == 0, f"{quant}: {result.output}"
