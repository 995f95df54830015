"""The names of the tests: workers that share the suite must find the same ones, at whatever moment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def names(hash_seed: str) -> list[str]:
    """The tests that a process of its own finds; it takes seconds, so two find them at different times."""
    words = ["-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", str(Path(__file__).parent)]
    found = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line for line in found.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_every_process_finds_the_same_tests() -> None:
    first, second = names("1"), names("2")
    assert len(first) > 1000
    assert first == second
