"""Checks every output before any work: its location is writable, has room, and no other file is harmed.

An output never takes the place of a file that the same command reads, whatever `--force` says; a link is
never written through.
"""

from __future__ import annotations

import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from dsconvert.errors import OutputError

PART, REPLACED = ".part", ".part-replaced"
NAME_BYTES = 255  # of a file's name, on every file system in use
# The end of a part: it says that the file is nobody's but ours, and may be overwritten.
UNFINISHED = b"\ndsconvert: this file is unfinished\n"
# The same where a set of files is being renamed, and some have their final names already.
PUBLISHING = b"\ndsconvert: this set is published.\n\n"
Known = Callable[[Path], bool]
# What this process has left unfinished, for the word at its end.
left: list[Path] = []


def part_of(path: Path) -> Path:
    """Where a file or folder is made."""
    return path.with_name(path.name + PART)


def look(path: Path) -> os.stat_result | None:
    """What is at `path`, links not followed; None for nothing. OutputError where one may not look."""
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _closed(path, error) from None


def check_place(path: Path, suffix: str = PART) -> None:
    """See that `path`, and `path` with `suffix`, can be made; raises OutputError."""
    if path.name in ("", ".."):
        raise OutputError(
            "cannot be the name of an output", where=path, hint="Give the name of a file or folder"
        )
    spare = NAME_BYTES - len(os.fsencode(path.name)) - len(suffix)
    if spare < 0:
        raise OutputError(
            f"the name is {-spare} bytes too long",
            where=path,
            why=f"A name may have {NAME_BYTES} bytes, and {suffix} is put behind it while it is made",
            hint="Give a shorter name",
        )
    try:
        folder = os.stat(path.parent)
    except FileNotFoundError:
        raise OutputError(
            "the folder does not exist", where=path.parent, hint=f"mkdir -p {path.parent}"
        ) from None
    except OSError as error:
        raise _closed(path.parent, error) from None
    if not stat.S_ISDIR(folder.st_mode):
        raise OutputError(
            "is a file, not a folder", where=path.parent, hint="Give another place for the output"
        )
    effective = os.access in os.supports_effective_ids
    if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=effective):
        raise OutputError(
            "the folder may not be written",
            where=path.parent,
            why="Its permissions, or those of its file system, forbid it",
            hint="Give another place for the output",
        )


def check_files(
    paths: Sequence[Path],
    sizes: Sequence[int],
    *,
    force: bool,
    inputs: Sequence[Path] = (),
    ours: Known | None = None,
) -> None:
    """See that the files of one command can be written, of `sizes` bytes; raises OutputError.

    `inputs` are the files and folders that the command reads. What exists is replaced with `force`: in a
    folder that is read only files that `ours` knows, anywhere only files.
    """
    check_distinct(paths)
    for path in paths:
        check_place(path)
        found = look(path)
        if found is not None and stat.S_ISDIR(found.st_mode):
            raise OutputError("is a folder", where=path, hint="Give --outfile a file name inside it")
        _check_file(path, found)
        check_no_input(path, inputs, ours)
        if found is not None and not force and not _left_by_a_publication(path, paths):
            raise OutputError("exists already", where=path, hint="Give --force to replace it")
    for folder in {path.parent for path in paths}:
        here = [(path, size) for path, size in zip(paths, sizes, strict=True) if path.parent == folder]
        overwritten = sum(_allocated(part_of(path)) for path, _ in here)
        check_room(folder, sum(size for _, size in here), overwritten)
    for path, size in zip(paths, sizes, strict=True):
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if limit != resource.RLIM_INFINITY and size + len(UNFINISHED) > limit:
            raise too_large(path, f"The limit of this process is {limit:,} bytes (ulimit -f)")


def check_side_file(path: Path, *, ours: Known, kind: str, inputs: Sequence[Path] = ()) -> None:
    """See that a report or the like can be written; what exists is replaced only if `ours` knows it.

    `kind` is what `ours` knows, for messages. Raises OutputError.
    """
    check_place(path)
    found = look(path)
    _check_file(path, found)
    check_no_input(path, inputs, ours)
    if found is not None and found.st_size and not ours(path):
        raise OutputError(
            f"exists already and is not {kind}",
            where=path,
            why="Only a file of that kind is overwritten",
            hint="Give another name, or remove the file",
        )


def check_distinct(paths: Iterable[Path]) -> None:
    """Raises OutputError where two outputs of one command, or their parts, would be the same file."""
    seen: dict[str, Path] = {}
    for path in paths:
        folder = os.path.realpath(path.parent)
        for name in (path.name, path.name + PART):
            place = os.path.join(folder, name)
            if place in seen:
                raise OutputError(
                    "is named for two outputs of this command", where=path, hint="Give each its own name"
                )
            seen[place] = path


def check_no_input(path: Path, inputs: Iterable[Path], ours: Known | None = None) -> None:
    """Raises OutputError where the file `path`, or its part, is one that the command reads.

    Files are distinguished by identity, not by name: links and hard links count. In a folder that
    is read, files that `ours` knows are outputs of an earlier run, not inputs.
    """
    for target in (path, part_of(path)):
        if _stat(target) is None:
            continue
        for given in inputs:
            if _same(target, given) or (
                _reads(given, target) and not (ours is not None and target == path and ours(target))
            ):
                raise OutputError(
                    "is a file that this command reads",
                    where=target,
                    why=f"It belongs to {given}" if not _same(target, given) else "",
                    hint="Give the output another name",
                )


def check_holds_no_input(folder: Path, inputs: Iterable[Path]) -> None:
    """Raises OutputError where replacing or clearing `folder` would take away what the command reads."""
    found = _stat(folder)
    if found is None:
        return
    for given in inputs:
        if any(_same(folder, place) for place in _places(given)):
            raise OutputError(
                "is, or holds, what this command reads",
                where=folder,
                why=f"{given} would be lost",
                hint="Give the output another name",
            )


def check_room(folder: Path, needed: int, left_behind: int = 0) -> None:
    """Raises OutputError where `folder` has no room for `needed` bytes; `left_behind` are overwritten."""
    free = shutil.disk_usage(folder).free + left_behind
    if needed > free:
        raise OutputError(
            f"needs {needed:,} bytes, {free:,} are free",
            where=folder,
            hint="Free some space, choose a smaller type or another folder for the output",
        )


def too_large(path: Path, why: str) -> OutputError:
    """The error for a file that is larger than the file system or the process may write."""
    return OutputError(
        "the file would be too large for its file system or for this process",
        where=path,
        why=why,
        hint="Write to another file system, raise the limit, or give gguf --split-max-size 2G",
    )


def marked(part: Path, mark: bytes) -> bool:
    """Whether a plain file ends with `mark`."""
    try:
        descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return ends_with(descriptor, mark)
    finally:
        os.close(descriptor)


def ends_with(descriptor: int, mark: bytes) -> bool:
    """Whether an opened plain file ends with `mark`."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size < len(mark):
        return False
    return os.pread(descriptor, len(mark), found.st_size - len(mark)) == mark


def _check_file(path: Path, found: os.stat_result | None) -> None:
    """A plain file or nothing; the part is nothing, empty, or ours."""
    if found is not None and stat.S_ISLNK(found.st_mode):
        raise OutputError("is a link", where=path, hint="Give the name that it leads to, or remove the link")
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise OutputError("is not a regular file", where=path, hint="Give the output another name")
    part = part_of(path)
    old = look(part)
    empty = old is not None and old.st_size == 0 and stat.S_ISREG(old.st_mode)
    if old is not None and not (empty or marked(part, UNFINISHED) or marked(part, PUBLISHING)):
        raise not_ours(part)


def not_ours(path: Path) -> OutputError:
    """The error for something under a name of ours that we did not make."""
    return OutputError(
        "is in the way, and was not made by dsconvert",
        where=path,
        why="It would have to be overwritten",
        hint="Move or remove it, or give the output another name",
    )


def _left_by_a_publication(path: Path, paths: Sequence[Path]) -> bool:
    """Whether a run was killed while it renamed these files: the first, renamed last, is still a part."""
    first = paths[0]
    return path != first and look(first) is None and marked(part_of(first), PUBLISHING)


def _reads(given: Path, target: Path) -> bool:
    """Whether `target` lies in the folder `given`, or is a file of it by another name."""
    if not os.path.isdir(given):
        return False
    if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(given)):
        return True
    try:
        with os.scandir(given) as entries:
            return any(_same(target, Path(entry.path)) for entry in entries)
    except OSError:
        return False


def _places(given: Path) -> Iterator[Path]:
    """A file or folder, and every folder that it lies in: as it is named, and where links lead."""
    named, real = given.absolute(), Path(os.path.realpath(given))
    for place in (named, real):
        yield place
        yield from place.parents


def _same(one: Path, other: Path) -> bool:
    first, second = _stat(one), _stat(other)
    return first is not None and second is not None and os.path.samestat(first, second)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def _allocated(path: Path) -> int:
    found = look(path)
    return 0 if found is None else found.st_blocks * 512


def _closed(path: Path, error: OSError) -> OutputError:
    return OutputError(
        "cannot be looked at",
        where=path,
        why=error.strerror or str(error),
        hint="Give another place for the output",
    )
