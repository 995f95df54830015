"""What a GPTQ folder states of zero points and groups is held against what it stores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner, Result

from dsconvert.cli import cli

pytest.importorskip("torch")
TEXT = ("--calib", "builtin", "--calib-samples", 2, "--calib-len", 64)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("model") / "model", layers=1, d=64, ff=96)


@pytest.fixture(scope="module")
def outputs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A symmetric folder whose groups are runs, and one that is neither."""
    folder = tmp_path_factory.mktemp("outputs")
    made = {"plain": (), "other": ("--asym", "--dynamic-groups")}
    for name, options in made.items():
        done = command("gptq", model, "-g", 32, *TEXT, *options, "--effort", "off", "-o", folder / name)
        assert done.exit_code == 0, done.output
    return {name: folder / name for name in made}


def settings(model: Path, output: Path, change: Callable[[dict[str, Any]], object]) -> tuple[int, str]:
    """Verify's exit code and what it says of the settings, once config.json states others."""
    file = output / "config.json"
    original = file.read_text()
    try:
        config = json.loads(original)
        change(config["quantization_config"])
        file.write_text(json.dumps(config))
        result = command("verify", output, "--against", model, "--windows", 1, "--length", 32, "--json", "-")
    finally:
        file.write_text(original)
    checks = json.loads(result.stdout)["checks"]
    failed = [check["name"] for check in checks if not check["passed"]]
    assert failed == (["settings"] if result.exit_code else [])
    return result.exit_code, next(check["detail"] for check in checks if check["name"] == "settings")


@pytest.mark.parametrize(
    ("name", "stated", "code", "said"),
    [
        ("plain", {}, 0, "sym True, desc_act False, as the linears are stored"),
        ("plain", {"sym": False, "desc_act": True}, 0, "sym False, desc_act True, as the linears are stored"),
        ("other", {}, 0, "sym False, desc_act True, as the linears are stored"),
        ("other", {"sym": True}, 3, "sym is true, but zero points are not all 8 in "),
        ("other", {"desc_act": False}, 3, "desc_act is false, but g_idx does not name runs of inputs in "),
        ("other", {"sym": None, "desc_act": None}, 0, "no sym, no desc_act stated"),
    ],
)
def test_a_false_statement_fails_and_names_a_linear(
    model: Path, outputs: dict[str, Path], name: str, stated: dict[str, bool | None], code: int, said: str
) -> None:
    def change(settings: dict[str, Any]) -> None:
        settings.update(stated)
        for key in [key for key, value in stated.items() if value is None]:
            del settings[key]

    found, detail = settings(model, outputs[name], change)
    assert found == code, detail
    assert detail.startswith(said)
    assert ("of 7 linears, the first is model.layers.0." in detail) == (code == 3)
