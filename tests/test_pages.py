"""The pages of docs/: each stands in the site's navigation, its links lead somewhere, its commands run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsconvert.models.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each block of code."""
    yield from BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[str]:
    """The blocks of shell commands that use dsconvert, as a reader would type them one after the other."""
    return [text for kind, text in blocks(page) if kind == "sh" and re.search(r"^dsconvert ", text, re.M)]


OFTEN = ("index", "gguf", "gptq")  # the others are the slow tests'
RUN = [page for page in PAGES if commands(page)]


def test_pages_with_commands_are_found() -> None:
    assert {page.stem for page in RUN} >= {
        "index",
        "gguf",
        "gptq",
        "exl2",
        "imatrix",
        "calibration",
        "choosing",
    }


@pytest.mark.parametrize(
    "page",
    [page if page.stem in OFTEN else pytest.param(page, marks=pytest.mark.slow) for page in RUN],
    ids=lambda page: page.stem,
)
def test_the_commands_of_a_page_do_what_it_says(page: Path, tmp_path: Path) -> None:
    """All of them in one folder, in their order; what the page shows of their output is there."""
    if any("chat " in text for text in commands(page)) and importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs llama.cpp: pip install xllamacpp")
    program = tmp_path / "bin" / "dsconvert"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dsconvert "$@"\n')
    program.chmod(0o755)
    folder = tmp_path / "work"
    folder.mkdir()
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", "\n".join(commands(page))],
        cwd=folder, env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    shown = [line for kind, text in blocks(page) if kind == "text" for line in text.splitlines() if line]
    assert not [line for line in shown if line not in done.stdout]


def test_every_page_stands_in_the_navigation_once() -> None:
    def files(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from files(part)

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(files(site["nav"])) == [page.name for page in PAGES]


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as the site and a repository's page spell them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    named = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads} | {
        *named
    }


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES], ids=lambda page: page.stem
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def test_the_reference_has_the_functions_of_the_list() -> None:
    listed = re.findall(r"^\| `([\w.]+)` \|", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    shown = re.findall(r"^::: ([\w.]+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(shown) == sorted(listed)
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    for name in shown:
        said = made.described(name)
        assert said.startswith(f"### `{name}` {{#{name}}}\n")
        assert "```pycon\n>>> " in said
    with pytest.raises(LookupError):
        made.described("dsconvert.errors.nothing")


def test_the_page_on_limits_names_every_class() -> None:
    page = (DOCS / "limits.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+For\w+|\w+CausalLM|\w+TextModel)`", page)) == set(ARCHITECTURES)
