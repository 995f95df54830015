"""What README and docs say to type exists, and the changelog's version is the package's."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import date
from importlib.metadata import packages_distributions
from pathlib import Path

import click
import pytest

import dsconvert
from dsconvert.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
PROGRAMS = [path for path in BENCHMARKS if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
# Libraries that others import where they are installed, which they need not be here.
OPTIONAL = {"gptqmodel", "kernels", "exllamav2", "vllm", "accelerate", "optimum", "peft"}


def commands_of(text: str) -> list[list[str]]:
    """The words of every `dsconvert ...` in a block of code or between back-quotes."""
    found = re.findall(r"(?:^ {4}|`|run: |bin/)(?:\.venv/bin/)?dsconvert ([^`\n]+)", text, re.MULTILINE)
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        found += re.findall(r"^dsconvert (.+)", block, re.MULTILINE)
    return [re.split(r" {2,}", command)[0].split() for command in found]


def test_every_command_of_the_readme_exists_and_none_is_left_out() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## Commands")[1].split("\n## ")[0]
    named = set(re.findall(r"^    dsconvert (\w+)", table, re.MULTILINE))
    assert named == set(cli.list_commands(None))  # type: ignore[arg-type]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_name_commands_and_options_that_exist(page: Path) -> None:
    found = commands_of(page.read_text(encoding="utf-8"))
    assert found or page.stem == "reference"  # whose examples are Python's
    for name, *words in found:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, name
        known = {
            option for parameter in command.params for option in parameter.opts + parameter.secondary_opts
        }
        options = {word.partition("=")[0] for word in words if re.match(r"-{1,2}\w", word)}
        assert options <= {*known, "--help"}, f"{name}: {options - known}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_the_pages_name_are_there(page: Path) -> None:
    named = re.findall(r"\b((?:benchmarks|tests|docs)/[\w/.-]+\.(?:py|md))", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda script: script.stem)
def test_a_benchmark_hides_no_library(script: Path) -> None:
    """Its folder comes first on sys.path when one runs: its name would be taken for the library."""
    assert script.stem not in {*packages_distributions(), *OPTIONAL, *sys.stdlib_module_names}


@pytest.mark.parametrize("script", PROGRAMS, ids=lambda script: script.stem)
def test_a_benchmark_says_how_it_is_used(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "--help"], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert script.name in done.stdout + done.stderr


KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def test_the_changelog_is_kept_and_names_the_version() -> None:
    """In the form of Keep a Changelog: every version with its day, the newest first."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.startswith("# Changelog\n")
    heads = re.findall(r"^## (?!\[Unreleased\]$)(.*)$", text, re.MULTILINE)
    released = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", head) for head in heads]
    versions = [tuple(map(int, found.groups()[:3])) for found in released if found]
    days = [date.fromisoformat(found[4]) for found in released if found]
    assert len(versions) == len(heads)
    assert (versions, days) == (sorted(versions, reverse=True), sorted(days, reverse=True))
    assert ".".join(map(str, versions[0])) == dsconvert.__version__
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert kinds
        assert kinds == sorted(set(kinds), key=KINDS.index)
        for entries in re.split(r"^### .*$", section, flags=re.MULTILINE)[1:]:
            assert entries.strip().startswith("- ")
