"""llama.cpp as a judge of token ids, for the tests of this folder."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest


@pytest.fixture
def llama() -> Any:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs llama.cpp: pip install xllamacpp")
    from dsconvert.runtimes.llamacpp import Engine

    return lambda path: Engine(path, vocab_only=True)
