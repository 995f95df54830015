"""kill -9 at random moments of a GPTQ run: --resume goes on to the same bytes, whenever it was killed."""

from __future__ import annotations

from pathlib import Path

import calibrated
import tiny


def test_kill_at_20_random_moments_and_resume(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", layers=6, d=128, ff=352)
    resumed = calibrated.killed_and_resumed("gptq", model, tmp_path, 20, bits=4, group_size=32)
    assert resumed >= 5, "several should have gone on from finished blocks"
