"""What shells read to complete dsconvert, and what they are told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import get_completion_class
from click.testing import CliRunner

from dsconvert.cli import COMMANDS, cli
from dsconvert.commands.completion import SHELLS

ASK = "from dsconvert.cli import cli; cli(prog_name='dsconvert')"


def completions(*words: str) -> list[str]:
    """What bash is told to offer in the place of the last word."""
    variables = {
        "_DSCONVERT_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["dsconvert", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_the_one_that_click_makes(shell: str) -> None:
    found = get_completion_class(shell)
    assert found is not None
    wanted = found(cli, {}, "dsconvert", "_DSCONVERT_COMPLETE").source().strip()
    assert CliRunner().invoke(cli, ["completion", shell]).stdout == wanted + "\n"
    said = json.loads(CliRunner().invoke(cli, ["completion", shell, "--json"]).stdout)
    assert said == {"shell": shell, "script": wanted}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_accepts_the_script(shell: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"needs {shell}")
    script = tmp_path / "script"
    script.write_text(CliRunner().invoke(cli, ["completion", shell]).stdout, encoding="utf-8")
    done = subprocess.run([program, "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_options_and_values_are_completed() -> None:
    assert completions("") == list(COMMANDS)
    assert completions("to") == ["tokenizer"]
    assert completions("gguf", "--qu") == ["--quant", "--quiet"]
    assert completions("gguf", "--effort", "") == ["off", "quick", "full"]
    assert completions("gguf", "--quant", "q4_k") == ["q4_k_m", "q4_k_s"]
    assert completions("gguf", "--quant", "q8_0,iq4") == ["q8_0,iq4_nl", "q8_0,iq4_xs"]
