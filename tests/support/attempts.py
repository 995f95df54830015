"""A program that is killed at random moments and goes on: attempts.py KIND MODEL FOLDER KILLS OPTIONS.

One process imports once, then forks a child for each attempt and kills it at a random moment. One that is
killed is resumed; one that ends is compared with the run that nobody killed, and the next begins anew.
Every other one is killed only after it has finished a block, so that some have blocks to go on from however
little of the time the blocks take.
"""

from __future__ import annotations

import ast
import os
import random
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import calibrated
import torch

ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT


def main(kind: str, model: str, folder: Path, kills: int, settings: dict[str, Any]) -> None:
    """Print how often a run was killed, and how often one went on from finished blocks."""
    torch.set_num_threads(1)
    convert = import_module(f"converters.{kind}.convert").convert
    out = folder / ("out.gguf" if kind == "gguf" else "out")
    state = out.with_name(out.name + ".state")
    make = getattr(calibrated, f"{kind}_options")
    text = {"calib": "builtin", "calib_samples": 4, "calib_len": 128}
    options = make(model, out=out, resume=True, effort="off", **text, **settings)

    def finished() -> int:
        return len(list(state.glob("block-*.json")))

    def attempt(seconds: float | None, one_block: bool = False) -> int:
        before = finished()
        pid = os.fork()
        if pid == 0:
            list(convert(options))
            os._exit(0)
        while one_block and finished() <= before and os.waitid(os.P_PID, pid, ENDED) is None:
            time.sleep(0.001)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    list(convert(options))  # imports what is imported late, before the first fork
    calibrated.remove(out)
    started = time.monotonic()
    assert attempt(None) == 0
    whole = time.monotonic() - started
    good = calibrated.digests(out)
    assert not state.exists()
    calibrated.remove(out)
    rng = random.Random(5)
    killed = resumed = 0
    while killed < kills:
        resumed += finished() > 0
        one_block = rng.random() < 0.5
        code = attempt(rng.uniform(0, 0.02 if one_block else whole), one_block)
        assert code in (0, -signal.SIGKILL), code
        killed += code == -signal.SIGKILL
        if out.exists():
            assert calibrated.digests(out) == good, killed
            calibrated.remove(out)
    if not out.exists():
        assert attempt(None) == 0
    assert calibrated.digests(out) == good
    assert not state.exists()
    assert not list(folder.glob("*.part"))
    sys.stdout.write(f"{killed} {resumed}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), ast.literal_eval(sys.argv[5]))
