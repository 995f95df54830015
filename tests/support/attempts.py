"""A program that is killed at random moments and goes on."""

from __future__ import annotations

# One process imports once, then forks a child for each attempt and kills it at a random moment. One that is
# killed is resumed; one that ends is compared with the run that nobody killed, and the next begins anew.
ATTEMPTS = """
import hashlib, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from converters.gptq.convert import convert
from converters.gptq.plan import Options

torch.set_num_threads(1)
model, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
out, state = folder / "out", folder / "out.state"
asked = dict(bits=4, group_size=32, calib="builtin", calib_samples=4, calib_len=128, verify="off")

def run():
    list(convert(Options(model, out=out, resume=True, **asked)))

def files():
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir()}

def attempt(seconds):
    pid = os.fork()
    if pid == 0:
        run()
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

run()  # imports what is imported late, before the first fork
shutil.rmtree(out)
started = time.monotonic()
assert attempt(None) == 0
whole = time.monotonic() - started
good = files()
assert not state.exists()
shutil.rmtree(out)
rng = random.Random(5)
killed = resumed = 0
while killed < kills:
    resumed += any(state.glob("block-*.json"))
    code = attempt(rng.uniform(0, whole))
    assert code in (0, -signal.SIGKILL), code
    killed += code == -signal.SIGKILL
    if out.exists():
        assert files() == good, killed
        shutil.rmtree(out)
if not out.exists():
    assert attempt(None) == 0
assert files() == good
assert not state.exists() and not list(folder.glob("*.part"))
print(killed, resumed)
"""
