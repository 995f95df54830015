"""Peak resident anonymous memory of a conversion: under 400 MB, and the same whatever the model's size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from peak_memory import LIMIT, MEASURE


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory (Linux)")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_memory_does_not_grow_with_the_model(form: str, tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 10):
        model = tmp_path / f"model{layers}"
        tiny.tiny_checkpoint(
            model, layers=layers, d=1024, ff=3072, heads=8, kv_heads=8, vocab=4096, format=form
        )
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            MEASURE,
            str(model),
            str(tmp_path / f"{layers}.gguf"),
            form,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    weights = sum(path.stat().st_size for path in (tmp_path / "model10").glob("*model*"))
    assert weights > 200e6
    assert max(peaks) < LIMIT, peaks
    assert peaks[1] - peaks[0] < 40e6, peaks
