"""A command in a pseudo-terminal, as a user has it: read until a text comes, type, press keys."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """`dsconvert` with these arguments in a terminal of its own; a context manager that ends it."""

    def __init__(self, *arguments: object) -> None:
        self.text, self._at = "", 0
        self._code: int | None = None
        words = [sys.executable, "-m", "dsconvert", *map(str, arguments)]
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        self._pid, self._master = pty.fork()
        if not self._pid:
            os.execve(sys.executable, words, variables)

    def expect(self, text: str, seconds: float = 120) -> str:
        """Read until `text` comes after what was expected last; returns what came before it."""
        end = time.monotonic() + seconds
        while (found := self.text.find(text, self._at)) < 0:
            if not self._receive(end - time.monotonic()):
                raise AssertionError(
                    f"{text!r} did not come; after what was expected: {self.text[self._at :]!r}"
                )
        before = self.text[self._at : found]
        self._at = found + len(text)
        return before

    def more(self, seconds: float = 120) -> None:
        """Wait for any text after what was expected last."""
        end = time.monotonic() + seconds
        while not self.text[self._at :].strip():
            if not self._receive(end - time.monotonic()):
                raise AssertionError("nothing came")

    def type(self, text: str) -> None:
        """Type a text, or press a key."""
        os.write(self._master, text.encode())

    def ended(self, seconds: float = 60) -> int:
        """Wait until the program has ended; its exit code."""
        end = time.monotonic() + seconds
        while self._receive(max(0.0, end - time.monotonic())):
            pass
        done, status = os.waitpid(self._pid, 0 if time.monotonic() < end else os.WNOHANG)
        if not done:
            raise AssertionError(f"it has not ended, but says: {self.text[self._at :]!r}")
        self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def _receive(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], max(0.0, seconds))[0]:
            return False
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.text += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._code is None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._master)
