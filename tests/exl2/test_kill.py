"""kill -9 at random moments of an EXL2 run: --resume goes on to the same bytes, whenever it was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tiny
from attempts import ATTEMPTS

ASKED = 'bits=4, group_size=32, calib="builtin"'


def test_kill_at_20_random_moments_and_resume(tmp_path: Path) -> None:
    assert ASKED in ATTEMPTS
    script = ATTEMPTS.replace("converters.gptq", "converters.exl2").replace(ASKED, 'bpw=5.0, calib="builtin"')
    model = tiny.tiny_checkpoint(tmp_path / "model", layers=6, d=64, ff=160)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-W", "ignore", "-c", script, str(model), str(tmp_path / "out"), "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    killed, resumed = map(int, done.stdout.split())
    assert killed == 20
    assert resumed >= 3, "several should have gone on from finished blocks"
