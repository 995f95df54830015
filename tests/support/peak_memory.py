"""A program that measures a conversion's peak memory."""

from __future__ import annotations

LIMIT = 400e6


# A thread samples this process's own RssAnon: memory that is the process's and no mapped file's.
MEASURE = """
import sys, threading, time
from pathlib import Path
from converters.gguf.convert import convert
from converters.gguf.output import Options

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
