"""Rounding to the types of plain checkpoints, against torch's."""

from __future__ import annotations

import numpy as np
import pytest

from dsconvert.checkpoints.rounding import nearest

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_rounds_every_exponent_and_tie_as_torch_does(name: str, dtype: torch.dtype) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    bits[::4] &= np.uint32(0xFFFF0000)
    bits[1::4] = bits[1::4] & np.uint32(0xFFFF0000) | np.uint32(0x8000)  # ties of bf16
    values = bits.view(np.float32)
    expected = torch.from_numpy(values).to(dtype).float().numpy()
    found = nearest(values, name)
    assert found is not None
    np.testing.assert_array_equal(found, expected)


def test_other_types() -> None:
    values = np.array([1.1, -3.3], np.float32)
    same = nearest(values, "f32")
    assert same is not None
    assert same is not values
    np.testing.assert_array_equal(same, values)
    assert nearest(values, "i8") is None
