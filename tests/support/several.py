"""Several processes of one command, as torchrun starts them."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass

SECONDS = 400


@dataclass(frozen=True)
class Done:
    """How a process ended, and what it said."""

    code: int
    out: str
    err: str


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **more}


def processes(*words: object, count: int = 2) -> list[Done]:
    """Run `python WORDS...` as so many processes, told of each other as torchrun tells them."""
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            env=environment(**group, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        said = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Done(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def free_port() -> int:
    """A port below those that systems give to outgoing connections, which could take it before it is used."""
    while True:
        port = random.randrange(15000, 30000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
