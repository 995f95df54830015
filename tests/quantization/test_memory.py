"""Peak memory of a calibrated quantization: a block and the calibration's states, not the model."""

from __future__ import annotations

from pathlib import Path

import peak_memory
import pytest
import tiny

LAYERS = (2, 6)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory (Linux)")
@pytest.mark.parametrize("kind", ["gptq", pytest.param("exl2", marks=pytest.mark.slow)])
def test_memory_grows_with_the_block_and_not_with_the_model(kind: str, tmp_path: Path) -> None:
    peaks = []
    for layers in LAYERS:
        model = tiny.tiny_checkpoint(
            tmp_path / f"model{layers}", layers=layers, d=512, ff=1376, heads=8, kv_heads=8, vocab=1024
        )
        peaks.append(peak_memory.measured(kind, model, tmp_path / f"{layers}", loads_torch=True))
    block = 4 * (4 * 512 * 512 + 3 * 512 * 1376)
    assert peaks[1] - peaks[0] < 2 * block < (LAYERS[1] - LAYERS[0]) * block, peaks
