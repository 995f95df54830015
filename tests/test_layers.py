"""The import rules of the architecture: who may import whom, and what must stay lazy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dsconvert", "converters", "tokenizer_tools")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = ("torch", "transformers", "numba", "tokenizers", "rich", "gguf", "huggingface_hub", "numpy")
LINES = 320


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(module: str, imported: str) -> bool:
    """Whether the architecture forbids this import."""

    def inside(*names: str) -> bool:
        return any(imported == name or imported.startswith(name + ".") for name in names)

    if module in ("dsconvert.cli", "dsconvert.__main__") or module.startswith("dsconvert.commands"):
        return False
    if inside("dsconvert.cli", "dsconvert.commands"):
        return True
    if module.startswith("dsconvert.archs"):
        return inside("dsconvert", "converters", "tokenizer_tools") and not (
            inside("dsconvert.arch", "dsconvert.archs") or imported == "dsconvert"
        )
    if module.startswith("dsconvert"):
        return inside("converters", "tokenizer_tools")
    if module.startswith("tokenizer_tools"):
        return inside("converters") or (
            inside("dsconvert")
            and not (inside("dsconvert.errors", "dsconvert.reading") or imported == "dsconvert")
        )
    own = ".".join(module.split(".")[:2])
    return inside("converters") and not (inside(own) or imported == "converters") and own != "converters"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    wrong = [imported for imported in imports(path) if forbidden(name_of(path), imported)]
    assert not wrong, f"{name_of(path)} must not import {wrong}"


def test_the_rules_can_fail() -> None:
    assert forbidden("dsconvert.verify", "converters.gguf.reader")
    assert forbidden("converters.gguf.convert", "dsconvert.commands.sources")
    assert forbidden("converters.gguf.convert", "converters.gptq.solver")
    assert forbidden("tokenizer_tools.load", "dsconvert.checkpoint")
    assert not forbidden("tokenizer_tools.load", "dsconvert.reading")
    assert forbidden("dsconvert.archs.llama", "dsconvert.checkpoint")
    assert not forbidden("converters.gguf.convert", "converters.gguf.recipe")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_console_prints(path: Path) -> None:
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert name_of(path) == "dsconvert.console" or not calls, f"print() in lines {calls}"


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*sorted(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import dsconvert.cli, click.testing\nclick.testing.CliRunner().invoke(dsconvert.cli.cli, ['--help'])"
    )
    assert loaded_after(code) == set()


def test_gguf_path_loads_no_torch() -> None:
    loaded = loaded_after("import converters.gguf.convert")
    assert not loaded & {"torch", "transformers", "numba"}
