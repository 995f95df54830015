"""Every function that docs/api.md lists has an example in its docstring, and all examples are run."""

from __future__ import annotations

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
NAMES = re.findall(r"^\| `([\w.]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
PACKAGES = ("dsconvert", "converters", "tokenizer_tools")
ROOT = Path(__file__).parents[1]
OTHERS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if re.search(r"^ +>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)
)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_function_has_an_example(name: str) -> None:
    module, _, function = name.rpartition(".")
    assert ">>> " in (getattr(import_module(module), function).__doc__ or "")


@pytest.mark.parametrize("module", OTHERS)
def test_the_examples_of_a_module_hold(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = r"converters\.(gptq|compressed|exl2|mlx)|dsconvert\.proof|converters\.gguf\.importance_file"
    if re.match(formats, module):
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)  # some examples write files
    found = doctest.testmod(import_module(module))
    assert found.attempted
    assert not found.failed
