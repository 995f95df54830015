"""The README's commands and the changelog's version are those of the package."""

from __future__ import annotations

import re
from pathlib import Path

import dsconvert
from dsconvert.cli import cli

ROOT = Path(__file__).parents[1]


def test_every_command_of_the_readme_exists_and_none_is_left_out() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## Commands")[1].split("\n## ")[0]
    named = set(re.findall(r"^    dsconvert (\w+)", table, re.MULTILINE))
    assert named == set(cli.list_commands(None))  # type: ignore[arg-type]


def test_the_changelog_names_the_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first is not None
    assert first[1] == dsconvert.__version__
