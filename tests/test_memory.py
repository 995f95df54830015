"""Peak resident anonymous memory of a conversion: under 400 MB, and the same whatever the model's size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

LIMIT = 400e6
# A thread samples this process's own RssAnon: memory that is the process's and no mapped file's.
MEASURE = """
import sys, threading, time
from pathlib import Path
from converters.gguf.convert import convert
from converters.gguf.job import Options

peak, done = 0, threading.Event()

def sample():
    global peak
    while not done.is_set():
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.002)

thread = threading.Thread(target=sample)
thread.start()
options = Options(sys.argv[1], ("q4_0", "q8_0"), Path(sys.argv[2]), verify="off", threads=2)
list(convert(options))
done.set()
thread.join()
assert "torch" not in sys.modules or sys.argv[3] == "bin"
print(peak)
"""


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
