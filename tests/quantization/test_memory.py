"""Peak memory of a calibrated quantization: a block and the calibration's states, not the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

# A thread samples this process's own RssAnon: memory that is the process's and no mapped file's.
MEASURE = """
import sys, threading, time
from importlib import import_module
from pathlib import Path

kind, model, out = sys.argv[1:]
flow, job = (import_module(f"converters.{kind}.{part}") for part in ("convert", "plan"))
peak, done = 0, threading.Event()

def sample():
    global peak
    while not done.is_set():
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.01)

thread = threading.Thread(target=sample)
thread.start()
asked = dict(calib="builtin", calib_samples=2, calib_len=64, verify="off")
list(flow.convert(job.Options(model, out=Path(out), **asked)))
done.set()
thread.join()
print(peak)
"""
LAYERS = (2, 6)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory (Linux)")
@pytest.mark.parametrize("kind", ["gptq", "exl2"])
def test_memory_grows_with_the_block_and_not_with_the_model(kind: str, tmp_path: Path) -> None:
    peaks = []
    for layers in LAYERS:
        model = tiny.tiny_checkpoint(
            tmp_path / f"model{layers}", layers=layers, d=512, ff=1376, heads=8, kv_heads=8, vocab=1024
        )
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            MEASURE,
            kind,
            str(model),
            str(tmp_path / f"{layers}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    block = 4 * (4 * 512 * 512 + 3 * 512 * 1376)
    assert peaks[1] - peaks[0] < 2 * block < (LAYERS[1] - LAYERS[0]) * block, peaks
