"""Files of texts as data sets publish them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from dsconvert.events import Event
from dsconvert.texts.sets import TextSet


def gzipped(texts: list[str], level: int = 9) -> bytes:
    return gzip.compress(
        "".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), level, mtime=0
    )


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    arrow = pytest.importorskip("pyarrow", reason="parquet is read with pyarrow: pip install pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_table(arrow.table(columns), path)
    return path


def finished(loading: Generator[Event, None, TextSet]) -> TextSet:
    while True:
        try:
            next(loading)
        except StopIteration as done:
            text: TextSet = done.value
            return text


def documents(text: TextSet) -> list[str]:
    return [text.documents[i] for i in range(len(text.documents))]
