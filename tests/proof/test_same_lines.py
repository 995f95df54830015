"""A conversion and a later `verify` of what it wrote are one proof: the same lines, figures and verdict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dsconvert.cli import cli
from dsconvert.proof import effort

pytest.importorskip("torch")
CALIBRATION = ("--calib", "builtin", "--calib-samples", "4", "--calib-len", "128")
CASES: dict[str, tuple[str, ...]] = {
    "f16": ("gguf", "sample:", "-q", "f16"),
    "q4_0": ("gguf", "sample:", "-q", "q4_0"),
    "q4_k_m": ("gguf", "sample:", "-q", "q4_k_m"),
    "q2_k without BOS": ("gguf", "sample:", "-q", "q2_k", "--no-add-bos"),
    "gptq": ("gptq", "sample:", "-b", "4", "--no-add-bos", *CALIBRATION),
    "exl2": ("exl2", "sample:", "-b", "3.5", *CALIBRATION),
    "gptq with towers": ("gptq", "sample-vl:", "-b", "4", *CALIBRATION),
}
TEXT = ["token ids", "added tokens", "special tokens", "chat template"]
LOGITS = ["blocks", "mean KLD", "PPL ratio", "foretold KLD"]
# What is proven of each format, in this order; where only some blocks are run these instead of LOGITS.
NAMES = {
    "gguf": ["structure", "file type", *TEXT, "pre-tokenizer", "config", "weights"],
    "gptq": ["structure", "settings", "tokenizer", *TEXT, "config", "weights"],
    "exl2": ["structure", "bits per weight", "tokenizer", *TEXT, "config", "weights"],
}


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def lines(checks: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(check[key] for key in ("name", "passed", "detail", "value")) for check in checks]


def converted(*arguments: object) -> tuple[int, list[tuple[Any, ...]]]:
    result = command(*arguments, "--json")
    assert result.exit_code in (0, 3), result.output
    events = [json.loads(line) for line in result.stdout.splitlines()]
    return result.exit_code, lines([event for event in events if event["event"] == "check"])


def verified(*arguments: object) -> tuple[int, list[tuple[Any, ...]]]:
    result = command("verify", *arguments, "--json", "-")
    assert result.exit_code in (0, 3), result.output
    return result.exit_code, lines(json.loads(result.stdout)["checks"])


def bos_of(case: tuple[str, ...]) -> list[str]:
    return [word for word in case if word == "--no-add-bos"]


Made = dict[str, tuple[Path, list[tuple[Any, ...]]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """What each case wrote, and the lines of the conversion."""
    folder, found = tmp_path_factory.mktemp("same"), {}
    for name, case in CASES.items():
        out = folder / f"{name}.gguf"
        code, said = converted(*case, *(("--no-mmproj",) if case[0] == "gguf" else ()), "-o", out)
        assert code == 0, said
        found[name] = (out, said)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_conversion_and_verify_say_the_same(name: str, made: Made) -> None:
    """The option on BOS decides on the windows of a folder, whose files are the checkpoint's in any case."""
    (out, said), case = made[name], CASES[name]
    assert [line[0] for line in said] == NAMES[case[0]] + LOGITS
    assert verified(out, "--against", case[1], *bos_of(case)) == (0, said)


@pytest.mark.parametrize("name", ["q4_k_m", "gptq"])
def test_a_quick_proof_of_a_big_model_is_the_same_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effort, "QUICK_SECONDS", 0.0)  # as if the sample were big
    case, out = CASES[name], tmp_path / "out.gguf"
    code, said = converted(*case, "-o", out)
    assert [line[0] for line in said] == [*NAMES[case[0]], "blocks"]
    assert verified(out, "--against", case[1], *bos_of(case), "--effort", "quick") == (code, said)


def test_all_of_a_big_model_is_the_same_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "QUICK_SECONDS", 0.0)
    out = tmp_path / "out.gguf"
    made = converted("gguf", "sample:", "-o", out, "--effort", "full")
    assert [line[0] for line in made[1]] == NAMES["gguf"] + LOGITS
    assert verified(out, "--against", "sample:") == made


def test_a_pair_is_the_same_too(tmp_path: Path) -> None:
    text, projector = tmp_path / "out.gguf", tmp_path / "mmproj-out.gguf"
    made = converted("gguf", "sample-vl:", "-q", "q8_0", "-o", text)
    assert made[0] == 0
    assert {"mmproj structure", "mmproj images", "mmproj question"} <= {line[0] for line in made[1]}
    assert verified(text, "--against", "sample-vl:", "--mmproj", projector) == made


@pytest.mark.parametrize("name", ["q4_0", "gptq", "exl2"])
def test_a_verdict_of_verify_is_compares(name: str, made: Made) -> None:
    """Limits that the output does not keep are failed by `verify` and by `compare` alike."""
    out, said = made[name]
    strict = ("--against", "sample:", "--max-kld", "1e-9", *bos_of(CASES[name]))
    code, found = verified(out, *strict)
    assert code == 3
    assert [line[0] for line in found if not line[1]] == ["mean KLD"]
    assert [(n, value) for n, _, _, value in found] == [(n, value) for n, _, _, value in said]
    compared = command("compare", out, *strict, "--json", "-")
    assert compared.exit_code == 3
    assert lines(json.loads(compared.stdout)["outputs"][0]["checks"]) == found


def test_files_that_were_copied_are_looked_at_again(made: Made, tmp_path: Path) -> None:
    """Of a folder that dsconvert made; another tool's tokenizer files may be saved anew."""
    out = tmp_path / "out"
    shutil.copytree(made["gptq"][0], out)
    settings = out / "generation_config.json"
    assert settings.is_file()
    settings.unlink()
    code, found = verified(out, "--against", "sample:")
    assert code == 3
    assert [line[2] for line in found if not line[1]] == ["missing: generation_config.json"]
    shutil.copy(out / "tokenizer_config.json", settings)
    code, found = verified(out, "--against", "sample:")
    assert [line[2] for line in found if not line[1]] == ["differ: generation_config.json"]
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["meta"]["quantizer"] = ["another:1.0"]
    (out / "config.json").write_text(json.dumps(config))
    code, found = verified(out, "--against", "sample:")
    assert code == 0
    assert "tokenizer" not in [line[0] for line in found]
