"""kill -9 at random moments of a GPTQ run: --resume goes on to the same bytes, whenever it was killed."""

from __future__ import annotations

from pathlib import Path

import calibrated
import pytest
import tiny


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_at_random_moments_and_resume(tmp_path: Path, kills: int) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", layers=6, d=128, ff=352)
    resumed = calibrated.killed_and_resumed("gptq", model, tmp_path, kills, bits=4, group_size=32)
    assert resumed >= kills // 4, "some should have gone on from finished blocks"
