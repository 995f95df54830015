"""What --debug shows beside tracebacks: how long the phases of the work take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PHASE = re.compile(r"^(\w.*?) +[\d.]+ s, +[\d.]+ s of processor$", re.MULTILINE)


def phases(*options: str) -> list[str]:
    command = [sys.executable, "-m", "dsconvert", "gguf", "sample:", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not PHASE.findall(done.stdout)
    return PHASE.findall(done.stderr)


PLAN = ["imports", "tokenizer", "proof of its regexes", "layout", "plan, in all"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--dry-run", "--debug"), PLAN),
        (("--effort", "off", "--debug"), [*PLAN, "kernels", "write"]),
        (("--dry-run",), []),
    ],
    ids=["plan", "write", "without"],
)
def test_phases_are_shown_where_they_are_asked_for(
    options: tuple[str, ...], expected: list[str], tmp_path: Path
) -> None:
    assert phases(*options, "--out", str(tmp_path / "out.gguf")) == expected
