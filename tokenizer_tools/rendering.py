"""Renders chat templates in a separate process with limits, since a template may be hostile.

One process serves all renderings of a command. It is started ahead of need, since it takes as long as
importing jinja2 does, and again after a template has broken it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizer_tools.template_worker import LENGTH, SECONDS, TEXT_LIMIT

WALL = 6.0  # seconds; the kernel counts processor time, which passes more slowly on a busy machine
STARTING = 30.0  # until it is ready, which takes 0.1 s on a machine that is not busy
ANSWER_LIMIT = 12 * TEXT_LIMIT  # JSON spells a character with up to 12 bytes
SCRIPT = Path(__file__).with_name("template_worker.py")


class Unrendered(Exception):
    """A template gave no text: `kind` is what it raised, `broke` whether it went over a limit."""

    def __init__(self, kind: str, message: str, broke: bool = False) -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind, self.broke = kind, broke


class _Process:
    """The rendering process, of the process that started it."""

    def __init__(self) -> None:
        self.owner, self.fresh = os.getpid(), True
        self.child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the tool
        )
        self._send([str(Path(place).resolve()) for place in sys.path if place])

    def ask(self, request: Mapping[str, Any]) -> str:
        """The text that is the answer to a request; Unrendered when there is none, or none in time."""
        try:
            if self.fresh:
                self._answer(STARTING)
                self.fresh = False
            self._send(request)
            answer = self._answer(WALL)
        except TimeoutError:
            raise Unrendered("TimeoutError", f"took more than {WALL:g} seconds", broke=True) from None
        except (OSError, EOFError):
            raise self._ended() from None
        if "text" in answer:
            return str(answer["text"])
        kind, message = answer["error"]
        raise Unrendered(kind, message, broke=kind == "MemoryError")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self.child.kill()
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _send(self, value: Any) -> None:
        data = json.dumps(value).encode()
        assert self.child.stdin is not None  # asked for
        self.child.stdin.write(LENGTH.pack(len(data)) + data)
        self.child.stdin.flush()

    def _answer(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        size = LENGTH.unpack(self._receive(LENGTH.size, end))[0]
        answer: dict[str, Any] = json.loads(self._receive(min(size, ANSWER_LIMIT), end))
        return answer

    def _receive(self, size: int, end: float) -> bytes:
        assert self.child.stdout is not None  # asked for
        pipe, parts = self.child.stdout.fileno(), bytearray()
        while len(parts) < size:
            if not select.select([pipe], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError
            part = os.read(pipe, min(size - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def _ended(self) -> Unrendered:
        """Why the process is gone."""
        code = self.child.wait()
        if code == -signal.SIGXCPU:
            return Unrendered("TimeoutError", f"took more than {SECONDS} seconds", broke=True)
        named = signal.Signals(-code).name if -code in set(signal.Signals) else str(code)
        return Unrendered("RuntimeError", f"its process ended with {named}", broke=True)


_lock = threading.Lock()
_running: list[_Process] = []


def start() -> None:
    """Start the process now, so that it is ready when the first template comes."""
    with _lock:
        _process()


def stop() -> None:
    """End the process, if one runs; the next rendering starts another."""
    while _running:
        process = _running.pop()
        if process.owner == os.getpid():
            process.close()


def render(template: str, values: Mapping[str, Any]) -> str:
    """The text that a template makes of the values, all of them JSON; raises Unrendered."""
    with _lock:
        try:
            return _process().ask({"template": template, "values": values})
        except Unrendered as error:
            if error.broke:
                stop()
            raise


def _process() -> _Process:
    if _running and (_running[0].owner != os.getpid() or _running[0].child.poll() is not None):
        stop()
    if not _running:
        _running.append(_Process())
    return _running[0]


atexit.register(stop)
