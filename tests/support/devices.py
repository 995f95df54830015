"""The devices that a test of device-dependent code runs on: the same test on a CPU, and on CUDA if there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

_CUDA = (
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
DEVICES: tuple[Any, ...] = ("cpu", pytest.param("cuda", marks=_CUDA))
