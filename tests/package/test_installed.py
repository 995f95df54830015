"""The wheel in an environment that has nothing else: what it brings, and what its commands do without torch.

`python3 dev.py package` builds the wheel, installs it and names the folder of the environment's programs.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import dsconvert
from dsconvert.cli import COMMANDS
from dsconvert.libraries import EXTRAS

PROGRAMS = os.environ.get("DSCONVERT_INSTALLED")
pytestmark = pytest.mark.skipif(PROGRAMS is None, reason="needs the wheel, installed: python3 dev.py package")


def run(folder: Path, *words: str, program: str = "dsconvert") -> subprocess.CompletedProcess[str]:
    """A program of the environment, from a folder of its own, without this checkout in sight."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [str(Path(PROGRAMS or "") / program), *words],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_it_brings_no_library_of_an_extra(tmp_path: Path) -> None:
    listed = run(tmp_path, "-m", "pip", "list", "--format", "json", program="python").stdout
    installed = {package["name"]: package["version"] for package in json.loads(listed)}
    assert installed["dsconvert"] == dsconvert.__version__
    assert not set(installed) & {name for names in EXTRAS.values() for name in names}
    checked = run(tmp_path, "-m", "pip", "check", program="python")
    assert checked.returncode == 0, checked.stdout


def test_the_script_and_the_module_are_one_program(tmp_path: Path) -> None:
    wanted = (0, f"dsconvert, version {dsconvert.__version__}\n")
    for words, program in ((("--version",), "dsconvert"), (("-m", "dsconvert", "--version"), "python")):
        done = run(tmp_path, *words, program=program)
        assert (done.returncode, done.stdout) == wanted


def test_the_sample_is_converted_and_proven(tmp_path: Path) -> None:
    done = run(tmp_path, "gguf", "sample:", "--quant", "q4_0,q4_k_m")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity") + done.stderr.count("perplexity") == 2
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["sample-q4_0.gguf", "sample-q4_k_m.gguf"]
    for command in (
        ("verify", files[0], "--against", "sample:", "--report", "proof.html"),
        ("compare", *files, "--against", "sample:"),
        ("inspect", files[1], "--tensors"),
        ("tokenizer", files[1], "--encode", "Hello  world"),
    ):
        done = run(tmp_path, *command)
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.parametrize(
    "words",
    [
        ("gptq", "sample:", "--calib", "builtin"),
        ("exl2", "sample:", "--calib", "builtin"),
        ("imatrix", "sample:", "--calib", "builtin"),
        ("gguf", "sample:", "--calib", "builtin"),
        ("gguf", "sample-vl:"),
    ],
    ids=" ".join,
)
def test_what_needs_torch_says_what_to_install(words: tuple[str, ...], tmp_path: Path) -> None:
    done = run(tmp_path, *words)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "needs torch, which is not installed. Run `pip install torch transformers`" in line
    assert not list(tmp_path.iterdir())


def test_the_manual_pages_are_there(tmp_path: Path) -> None:
    pages = {path.name for path in (Path(PROGRAMS or "").parent / "share" / "man" / "man1").iterdir()}
    assert pages >= {"dsconvert.1", *(f"dsconvert-{name}.1" for name in COMMANDS)}
