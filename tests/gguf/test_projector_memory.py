"""Peak memory of a conversion with towers: under the bound of a language model's, whatever their size."""

from __future__ import annotations

from pathlib import Path

import peak_memory
import pytest
import tiny_vl


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory (Linux)")
def test_memory_does_not_grow_with_the_towers(tmp_path: Path) -> None:
    peaks = []
    for depth in (1, 6):
        o = tiny_vl.VL(
            hybrid=True, d=1024, heads=8, ff=512,
            width=768, mlp=3072, depth=depth, tower_heads=12, image=384,
            sam_width=384, sam_mlp=1536, sam_depth=2 * depth, sam_heads=6, sam_image=1024,
            window=14, global_layers=(1,), channels=128,
        )  # fmt: skip
        model = tiny_vl.vl_checkpoint(tmp_path / f"m{depth}", o)
        peaks.append(peak_memory.measured("gguf", model, tmp_path / f"{depth}.gguf"))
        assert (tmp_path / f"mmproj-{depth}.gguf").stat().st_size > 10e6
    assert max(peaks) < peak_memory.LIMIT, peaks
    assert peaks[1] - peaks[0] < 40e6, peaks
