"""Files that appear only when they are complete: written as `<name>.part`, synced, then renamed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from dsconvert.errors import OutputError

SYNC_FILE_RANGE_WRITE = 2


class PartFile:
    """A file being written at known offsets, by several threads; `<path>.part` until it is published."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes
        self.part = path.with_name(path.name + ".part")
        self.fd = _open_locked(self.part)
        os.ftruncate(self.fd, nbytes)

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

    def publish(self) -> None:
        """Give the file its final name."""
        os.replace(self.part, self.path)
        _sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove the part if it has not been published, and let go of the lock."""
        with suppress(OSError):
            if self.fd >= 0 and os.stat(self.part).st_ino == os.fstat(self.fd).st_ino:
                os.unlink(self.part)
        with suppress(OSError):
            os.close(self.fd)
        self.fd = -1


@contextmanager
def part_files(paths: Sequence[Path], sizes: Sequence[int], force: bool) -> Iterator[list[PartFile]]:
    """Open all parts of one conversion; on success sync and publish them, on any failure remove them.

    The first file is renamed last, since a runtime opens a split model by its first file.
    Raises OutputError when a final name exists (without `force`), when another process writes it, when the
    folder cannot be written or has no room.
    """
    check_targets(paths, sizes, force)
    with ExitStack() as stack:
        parts: list[PartFile] = []
        for path, size in zip(paths, sizes, strict=True):
            try:
                parts.append(PartFile(path, size))
            except OSError as error:
                raise write_error(path, error) from error
            stack.callback(parts[-1].discard)
        yield parts
        for part in parts:
            part.sync()
        for part in reversed(parts):
            part.publish()


def check_targets(paths: Sequence[Path], sizes: Sequence[int], force: bool) -> None:
    """See that every final name is free, in an existing folder with room for all; raises OutputError."""
    for path in paths:
        if path.is_dir():
            raise OutputError("is a folder", where=path, hint="Give --outfile a file name inside it")
        if path.exists() and not force:
            raise OutputError("exists already", where=path, hint="Give --force to replace it")
        if not path.parent.is_dir():
            raise OutputError("the folder does not exist", where=path.parent, hint=f"mkdir -p {path.parent}")
    for folder in {path.parent for path in paths}:
        here = [(path, size) for path, size in zip(paths, sizes, strict=True) if path.parent == folder]
        left_behind = sum(_allocated(path.with_name(path.name + ".part")) for path, _ in here)
        needed, free = sum(size for _, size in here), shutil.disk_usage(folder).free + left_behind
        if needed > free:
            raise OutputError(
                f"needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
                where=folder,
                hint="Free some space, choose a smaller --quant or another --outfile folder",
            )


def write_error(path: Path, error: OSError) -> OutputError:
    """An OutputError that says what the system said and what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            "the disk is full",
            where=path,
            why=str(error.strerror),
            hint="Nothing was left under the final name; free some space and run the same command again",
        )
    return OutputError("cannot be written", where=path, why=error.strerror or str(error))


def _open_locked(part: Path) -> int:
    """Open `part` for this process alone; a part left behind by a killed process is taken over."""
    while True:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have published (renamed) the file between our open and our lock.
            if os.fstat(fd).st_ino == os.stat(part).st_ino:
                os.ftruncate(fd, 0)
                return fd
        except BlockingIOError:
            os.close(fd)
            raise OutputError(
                "another process is writing this file",
                where=part,
                hint="Wait for it to end, or choose another --outfile",
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


def _allocated(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except OSError:
        return 0


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        pass  # some file systems cannot sync a folder; the rename itself is atomic all the same
    finally:
        os.close(fd)
