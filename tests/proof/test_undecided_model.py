"""Faithful outputs of a model of random weights, which is undecided between tokens everywhere, pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner, Result

from dsconvert.cli import cli

pytest.importorskip("torch")
TEXT = ("--calib", "builtin", "--calib-samples", 4, "--calib-len", 128)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "options",
    [("gguf", "-q", "q4_0"), ("gguf", "-q", "q2_k"), ("gptq", "-b", 4), ("gptq", "-b", 2), ("exl2", "-b", 4)],
    ids=lambda options: "-".join(map(str, options)),
)
def test_its_top_tokens_turn_and_its_outputs_pass(tmp_path: Path, options: tuple[object, ...]) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", d=256, ff=512, kv_heads=4, vocab=2048)
    out = tmp_path / ("out.gguf" if options[0] == "gguf" else "out")
    text = () if options[0] == "gguf" else TEXT
    made = command(options[0], model, *options[1:], *text, "-o", out)
    assert made.exit_code == 0, made.output
    short = ("--windows", 1, "--length", 128, "--json", "-")
    result = command("verify", out, "--against", model, *short)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["figures"]["same_top"]["value"] < 0.7
    assert "same top p" not in {check["name"] for check in found["checks"]}
    asked = command("verify", out, "--against", model, *short, "--min-top1", 0.7)
    assert asked.exit_code == 3, asked.output
