"""Files that appear only when they are complete: written as `<name>.part`, synced, then renamed.

Every file that a command leaves goes through here. A part ends in a mark that says whose it is; a part
without it is not touched. Links are not followed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from dsconvert.checkpoints import bus_error
from dsconvert.checkpoints.output_plan import (
    PUBLISHING,
    UNFINISHED,
    Known,
    check_files,
    ends_with,
    left,
    look,
    not_ours,
    part_of,
    too_large,
)
from dsconvert.errors import OutputError

SYNC_FILE_RANGE_WRITE = 2


class PartFile:
    """A file being written at known offsets, by several threads; `<path>.part` until it is published.

    Raises OutputError where the part is a link, is another process's or nobody's of ours, or has no room.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes
        self.part = part_of(path)
        try:
            self.fd = _open_locked(self.part)
        except OSError as error:
            raise write_error(path, error) from error
        bus_error.remove(self.part)
        try:
            self._mark(UNFINISHED)  # beyond the end, so that the file is ours from its first byte on
        except BaseException:
            self.discard()
            raise

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`; thread-safe. Raises OutputError when the disk refuses."""
        view = memoryview(data).cast("B")
        try:
            while view:
                count = os.pwrite(self.fd, view, offset)
                _write_back(self.fd, offset, count)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise write_error(self.path, error) from error

    def sync(self) -> None:
        """Make the content durable before the name says that it is there."""
        try:
            os.fsync(self.fd)
        except OSError as error:
            raise write_error(self.path, error) from error

    def announce(self) -> None:
        """Say that the files of a set are being renamed: one killed between two of them is known by it."""
        self._mark(PUBLISHING)
        self.sync()

    def publish(self, replace: bool = True) -> None:
        """Give the file its final name; OutputError where it exists meanwhile, unless it may `replace`."""
        if not replace and look(self.path) is not None:
            raise OutputError(
                "appeared while its content was made", where=self.path, hint="Give the output another name"
            )
        try:
            os.ftruncate(self.fd, self.nbytes)  # the mark goes
            os.replace(self.part, self.path)
        except OSError as error:
            raise write_error(self.path, error) from error
        bus_error.keep(self.part)
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove the part if it has not been published, and let go of the lock."""
        try:
            if self.fd >= 0 and os.path.samestat(os.lstat(self.part), os.fstat(self.fd)):
                os.unlink(self.part)
        except FileNotFoundError:
            pass
        except OSError:
            left.append(self.part)
        bus_error.keep(self.part)
        with suppress(OSError):
            os.close(self.fd)
        self.fd = -1

    def _mark(self, mark: bytes) -> None:
        try:
            os.pwrite(self.fd, mark, self.nbytes)
        except OSError as error:
            raise write_error(self.path, error) from error


@contextmanager
def part_files(
    paths: Sequence[Path],
    sizes: Sequence[int],
    force: bool,
    inputs: Sequence[Path] = (),
    ours: Known | None = None,
) -> Iterator[list[PartFile]]:
    """Open all parts of one conversion; on success sync and publish them, on any failure remove them.

    The first file is renamed last, since a runtime opens a split model by its first file. Raises what
    `check_files` raises, and OutputError when another process writes there or the disk refuses.
    """
    check_files(paths, sizes, force=force, inputs=inputs, ours=ours)
    kept = {path for path in paths if look(path) is not None}  # by --force, or of a killed publication
    with ExitStack() as stack:
        parts: list[PartFile] = []
        for path, size in zip(paths, sizes, strict=True):
            parts.append(PartFile(path, size))
            stack.callback(parts[-1].discard)
        yield parts
        for part in parts:
            part.sync()
        if len(parts) > 1:
            parts[0].announce()
        for part in reversed(parts):
            part.publish(force or part.path in kept)


def write_file(path: Path, data: bytes, *, replace: bool) -> None:
    """Write a small file so that it is complete or absent; raises OutputError."""
    part = PartFile(path, len(data))
    try:
        part.write(data, 0)
        part.sync()
        part.publish(replace)
    finally:
        part.discard()


def write_error(path: Path, error: OSError) -> OutputError:
    """An OutputError that says what the system said and what to do about it."""
    why = error.strerror or str(error)
    if error.errno == errno.EFBIG:
        return too_large(path, why)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            "the disk is full",
            where=path,
            why=why,
            hint="Nothing was left under the final name; free some space and run the same command again",
        )
    if error.errno == errno.ELOOP:
        return OutputError(
            "is a link", where=part_of(path), hint="Remove it, or give the output another name"
        )
    return OutputError("cannot be written", where=path, why=why)


def _open_locked(part: Path) -> int:
    """Open `part` for this process alone; a part left behind by a killed process is taken over."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        fd = os.open(part, flags, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have published (renamed) the file between our open and our lock.
            if os.path.samestat(os.fstat(fd), os.lstat(part)):
                if os.fstat(fd).st_size and not (ends_with(fd, UNFINISHED) or ends_with(fd, PUBLISHING)):
                    raise not_ours(part)
                os.ftruncate(fd, 0)
                return fd
        except BlockingIOError:
            os.close(fd)
            raise OutputError(
                "another process is writing this file",
                where=part,
                hint="Wait for it to end, or choose another name for the output",
            ) from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _write_back(fd: int, offset: int, count: int) -> None:
    """Let the disk begin with these bytes now: at the end the sync then finds almost nothing to wait for."""
    start = _sync_file_range()
    if start is not None:
        start(fd, offset, count, SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Any:
    """The C library's sync_file_range, which Python does not offer; None where there is none."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        pass  # some file systems cannot sync a folder; the rename itself is atomic all the same
    finally:
        os.close(fd)
