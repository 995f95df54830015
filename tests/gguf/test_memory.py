"""Peak resident anonymous memory of a conversion: under 400 MB, and the same whatever the model's size."""

from __future__ import annotations

from pathlib import Path

import peak_memory
import pytest
import tiny


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory (Linux)")
@pytest.mark.parametrize("form", ["safetensors", pytest.param("bin", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_model(form: str, tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 10):
        model = tmp_path / f"model{layers}"
        tiny.tiny_checkpoint(
            model, layers=layers, d=1024, ff=3072, heads=8, kv_heads=8, vocab=4096, format=form
        )
        out = tmp_path / f"{layers}.gguf"
        peaks.append(peak_memory.measured("gguf", model, out, loads_torch=form == "bin"))
    weights = sum(path.stat().st_size for path in (tmp_path / "model10").glob("*model*"))
    assert weights > 200e6
    assert max(peaks) < peak_memory.LIMIT, peaks
    assert peaks[1] - peaks[0] < 40e6, peaks
