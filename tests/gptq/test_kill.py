"""kill -9 at random moments of a GPTQ run: --resume goes on to the same bytes, whenever it was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tiny
from attempts import ATTEMPTS


def test_kill_at_20_random_moments_and_resume(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", layers=6, d=128, ff=352)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-W", "ignore", "-c", ATTEMPTS, str(model), str(tmp_path / "out"), "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    killed, resumed = map(int, done.stdout.split())
    assert killed == 20
    assert resumed >= 5, "several should have gone on from finished blocks"
