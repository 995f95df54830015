"""The tests against other GPTQ tools: they need packages that the project itself does not."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

# Read when torch and gptqmodel are imported: no compiler for its kernels, a worker and a thread per core.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("OMP_NUM_THREADS", "1")
NEEDS = "needs gptqmodel and optimum in an environment of their own: run `python3 dev.py peers`"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder's tests, with what they need, where gptqmodel is not installed."""
    here = Path(__file__).parent
    if find_spec("gptqmodel") is None or find_spec("optimum") is None:
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=NEEDS))
