"""Time and bytes of `dsconvert gguf --remote` from a server with a round trip and a rate, beside a download.

    python benchmarks/remote_reading.py [--layers 4] [--round-trip 0.05] [--rate 50] [--quant q4_0]

The model has DeepSeek-VL-1.3B's width (2048), random weights and some layers. The server is the one of the
tests (tests/support/hub_server.py) in a process of its own: each answer comes after a round trip of so many
seconds, and each connection brings so many MB a second. "Straight" is what the bytes take over one such
connection. The download is huggingface_hub's, into a cache that is removed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import hub_server  # noqa: E402
import tiny  # noqa: E402

WIDE = {"d": 2048, "ff": 5632, "heads": 16, "kv_heads": 16, "vocab": 4096}


def serve(folder: Path, round_trip: float, rate: int, told: Connection) -> None:
    """Serve a folder as owner/name until the process is ended; tells the address."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub = hub_server.Hub({"owner/name": files}, delay=round_trip, rate=rate)
    with hub_server.serving(hub):
        told.send(hub.url)
        while True:
            time.sleep(1)


def run(url: str, home: Path, out: Path, *options: str) -> tuple[float, dict[str, int]]:
    """Seconds of a conversion, and what it says that it has read over the network."""
    command = [sys.executable, "-m", "dsconvert", "gguf", "owner/name", "-o", str(out), "--force", "--json"]
    environment = {**os.environ, **hub_server.client_environment(url, home), "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, env=environment)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return seconds, next((event for event in events if event["event"] == "fetched"), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--round-trip", type=float, default=0.05)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--quant", default="q4_0")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model = tiny.tiny_checkpoint(Path(work) / "model", tiny.Tiny(layers=asked.layers, **WIDE))
        nbytes = sum(path.stat().st_size for path in model.iterdir())
        ours, theirs = multiprocessing.Pipe()
        arguments = (model, asked.round_trip, int(asked.rate * 1e6), theirs)
        server = multiprocessing.Process(target=serve, args=arguments, daemon=True)
        server.start()
        url, out, home = ours.recv(), Path(work) / "out.gguf", Path(work) / "home"
        common = ("-q", asked.quant)
        run(url, home, out, *common, "--remote", "--effort", "off")  # kernels are compiled
        print(f"{nbytes / 1e6:.0f} MB, straight {nbytes / 1e6 / asked.rate:.1f} s")
        for name, options in {
            "remote, no proof": ("--remote", "--effort", "off"),
            "remote, quick proof": ("--remote",),
            "download, no proof": ("--effort", "off"),
        }.items():
            seconds, fetched = run(url, home, out, *common, *options)
            read = f"{fetched['nbytes'] / 1e6:.0f} MB in {fetched['answers']} answers" if fetched else ""
            print(f"{name:<20} {seconds:6.1f} s  {read}")
        server.terminate()


if __name__ == "__main__":
    main()
