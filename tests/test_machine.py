"""What the machine has, also on systems that do not say it the way Linux does."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsconvert import machine

# As on macOS: the function is not there, whoever looks for it and however late.
WITHOUT_AFFINITY = """
import os, sys
del os.sched_getaffinity
from dsconvert.cli import main
sys.argv = ["dsconvert", *sys.argv[1:]]
main()
"""


def test_free_memory_is_what_the_machine_has() -> None:
    assert 1e7 < machine.free_memory() < 1e14


def test_usable_cores_are_those_that_this_process_may_use() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from dsconvert.machine import usable_cores; print(usable_cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize(("count", "usable"), [(6, 6), (None, 1)])
def test_without_a_list_of_cores_all_are_usable(
    count: int | None, usable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert machine.usable_cores() == usable


def test_a_conversion_runs_where_there_is_no_list_of_cores(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_AFFINITY, "gguf", "sample:", "-o", str(tmp_path / "a.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mean KLD" in done.stdout  # the proof ran too


@pytest.mark.skipif(not hasattr(mmap.mmap, "madvise"), reason="needs madvise, which this system has not")
def test_pages_that_were_let_go_are_no_memory_of_this_process_and_come_back(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * (1 << 16))  # 16 MB
    with (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def resident() -> int:
        """KB of the map that are in memory."""
        lines = Path("/proc/self/smaps").read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.endswith(str(tmp_path / "file")))
        return int(next(line for line in lines[at:] if line.startswith("Rss:")).split()[1])

    assert np.frombuffer(mapped, np.uint8).max() == 255
    if sys.platform == "linux":
        assert resident() > 15000
    machine.let_go(mapped, 5000, (8 << 20) - 5000)
    if sys.platform == "linux":
        assert 7000 < resident() < 9000
    machine.let_go(mapped, 5000, len(mapped) - 5000)
    machine.let_go(mapped, 5000, 0)
    assert mapped[5000:5004] == bytes([136, 137, 138, 139])
