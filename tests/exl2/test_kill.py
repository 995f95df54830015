"""kill -9 at random moments of an EXL2 run: --resume goes on to the same bytes, whenever it was killed."""

from __future__ import annotations

from pathlib import Path

import calibrated
import pytest
import tiny


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_at_random_moments_and_resume(tmp_path: Path, kills: int) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", layers=6, d=64, ff=160)
    resumed = calibrated.killed_and_resumed("exl2", model, tmp_path, kills, bpw=5.0)
    assert resumed >= kills // 6, "some should have gone on from finished blocks"
