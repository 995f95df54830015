"""kill -9 at random moments of an EXL2 run: --resume goes on to the same bytes, whenever it was killed."""

from __future__ import annotations

from pathlib import Path

import calibrated
import pytest
import tiny


@pytest.mark.slow  # GPTQ's, through the same run, is tried every time
def test_kill_at_20_random_moments_and_resume(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", layers=6, d=64, ff=160)
    resumed = calibrated.killed_and_resumed("exl2", model, tmp_path, 20, bpw=5.0)
    assert resumed >= 3, "several should have gone on from finished blocks"
