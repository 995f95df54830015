"""kill -9 at random moments: never an incomplete file under a final name, and the next run succeeds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

# One process imports and compiles once, then forks a child for each attempt and kills it at a random moment
# of a conversion; the child that is allowed to finish tells how long that is.
ATTEMPTS = """
import hashlib, os, random, signal, sys, time
from pathlib import Path
from converters.gguf.convert import convert
from converters.gguf.output import Options

model, folder, attempts = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
out = folder / "out.gguf"

def run():
    list(convert(Options(model, quants=("q4_0", "q6_k"), outfile=out, force=True, effort="off", threads=2)))

def files():
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.gguf")}

def attempt(seconds):
    pid = os.fork()
    if pid == 0:
        run()
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

started = time.monotonic()
assert attempt(None) == 0
started = time.monotonic()
assert attempt(None) == 0
whole = time.monotonic() - started
good = files()
rng = random.Random(5)
killed = parts = 0
for number in range(attempts):
    for path in folder.glob("*.gguf"):
        path.unlink()
    code = attempt(rng.uniform(0, whole * 1.05))
    killed += code == -signal.SIGKILL
    parts += any(folder.glob("*.part"))
    assert all(good[name] == digest for name, digest in files().items()), number
assert attempt(None) == 0
assert files() == good
assert not list(folder.glob("*.part"))
print(killed, parts)
"""


@pytest.mark.parametrize("attempts", [16, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_at_random_moments(tmp_path: Path, attempts: int) -> None:
    model = tiny.tiny_checkpoint(
        tmp_path / "model", layers=4, d=512, ff=1536, heads=8, kv_heads=8, vocab=2048
    )
    (tmp_path / "out").mkdir()
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        ATTEMPTS,
        str(model),
        str(tmp_path / "out"),
        str(attempts),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    killed, parts = map(int, done.stdout.split())
    assert killed > attempts // 2, "most attempts should have been killed before they ended"
    assert parts > attempts // 10, "some should have been killed while a file was half written"
