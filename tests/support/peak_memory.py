"""The peak memory of a conversion, in a process of its own: peak_memory.py KIND MODEL OUT LOADS_TORCH."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

LIMIT = 400e6  # of a conversion to GGUF


def anonymous() -> int:
    """This process's own RssAnon in bytes: memory that is the process's and no mapped file's."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("peak memory is read from Linux' /proc/self/status")


@contextmanager
def sampled(every: float = 0.002) -> Iterator[list[int]]:
    """A list whose one value is the peak of `anonymous` so far, looked at in so many seconds."""
    peak, done = [anonymous()], threading.Event()

    def sample() -> None:
        while not done.wait(every):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def events(kind: str, model: str, out: Path) -> Any:
    """The conversion, still to be run."""
    convert = import_module(f"converters.{kind}.convert").convert
    if kind == "gguf":
        from converters.gguf.output import Options

        return convert(Options(model, ("q4_0", "q8_0"), out, effort="off", threads=2))
    import calibrated

    make = {"gptq": calibrated.gptq_options, "exl2": calibrated.exl2_options}[kind]
    return convert(make(model, out=out, calib="builtin", calib_samples=2, calib_len=64, effort="off"))


def measured(kind: str, model: Path, out: Path, loads_torch: bool = False) -> int:
    """The peak in bytes of a conversion by `kind`; AssertionError where it fails, or loads torch unasked."""
    words = [kind, str(model), str(out), str(int(loads_torch))]
    command = [sys.executable, "-W", "ignore", __file__, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    with sampled() as found:
        for _ in events(sys.argv[1], sys.argv[2], Path(sys.argv[3])):
            pass
    assert "torch" not in sys.modules or sys.argv[4] == "1"
    sys.stdout.write(f"{found[0]}\n")
