"""Tokenizers whose files state added tokens in several ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from dsconvert.checkpoints.locate import locate
from dsconvert.cli import cli


def entry(content: str, **flags: bool) -> dict[str, Any]:
    """An entry of added_tokens_decoder."""
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


Edit = Callable[[Path], None]


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None takes a key away."""
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    found |= values
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}), "utf-8")


def sample(folder: Path, edit: Edit) -> Path:
    """The embedded sample, changed."""
    shutil.copytree(locate("sample:"), folder)
    edit(folder)
    return folder


def convert(folder: Path, out: Path, *options: str) -> Any:
    command = ["gguf", str(folder), "-o", str(out), "--quant", "q8_0", *options]
    return CliRunner().invoke(cli, command)
