"""Puts the docstring of each function into the page of reference.md, which names it in a line `::: NAME`.

mkdocs calls `on_page_markdown` (see `hooks` in mkdocs.yml). Sources are read, not imported.
"""

from __future__ import annotations

import ast
import re
from inspect import cleandoc
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **given: Any) -> str:
    """A page with each `::: NAME` replaced by what is said of that function."""
    return re.sub(r"^::: ([\w.]+)$", lambda found: described(found[1]), markdown, flags=re.MULTILINE)


def described(name: str) -> str:
    """A function's heading, signature and docstring, as Markdown; raises LookupError where there is none."""
    module, _, function = name.rpartition(".")
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            said = prose(ast.get_docstring(node, clean=False) or "")
            return f"### `{name}` {{#{name}}}\n\n{signature(node)}\n\n{said}"
    raise LookupError(f"{module} has no function {function}")


def signature(node: ast.FunctionDef) -> str:
    """What the function takes and gives, a line for each argument."""
    empty = ast.FunctionDef(node.name, node.args, [ast.Pass()], [], node.returns, lineno=0)
    line = ast.unparse(empty).splitlines()[0].removesuffix(":")
    return f"```python\n{line}\n```"


def prose(docstring: str) -> str:
    """A docstring as Markdown: paragraphs as they are, examples as blocks of code."""
    parts = re.split(r"\n\s*\n", cleandoc(docstring))
    return "\n\n".join(f"```pycon\n{part}\n```" if part.startswith(">>> ") else part for part in parts)
