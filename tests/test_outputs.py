"""The outputs of the embedded samples are the bytes that they were before."""

from __future__ import annotations

import json
from pathlib import Path

import outputs
import pytest

# Made anew by `python tests/support/outputs.py PLAIN tests/outputs.json`: a new version changes every file's
# keys.
RECORDED: dict[str, str] = json.loads(Path(__file__).with_name("outputs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", outputs.PLAIN)
def test_the_outputs_are_the_bytes_that_they_were(name: str) -> None:
    found = dict(outputs.digests({name: outputs.PLAIN[name]}))
    recorded = {file: digest for file, digest in RECORDED.items() if file.startswith(f"{name}: ")}
    assert found == recorded


def test_every_recorded_file_belongs_to_a_command() -> None:
    assert {file.partition(": ")[0] for file in RECORDED} == set(outputs.PLAIN)
