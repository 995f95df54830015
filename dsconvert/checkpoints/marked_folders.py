"""Folders of ours: the part of an output, the state of a run, another program's work folder.

Such a folder holds a marker that says what it is. What stands under such a name without it is somebody
else's, and is neither emptied nor removed; a link is not followed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from dsconvert.checkpoints.output_files import sync_folder, write_error
from dsconvert.checkpoints.output_plan import (
    REPLACED,
    check_holds_no_input,
    check_place,
    check_room,
    left,
    look,
    not_ours,
    part_of,
)
from dsconvert.checkpoints.source_files import COMPANIONS
from dsconvert.errors import OutputError

MARKER = ".dsconvert"
# What a model folder holds, ours or another's: --force replaces a folder that holds nothing else.
MODEL_FILES = (
    *COMPANIONS,
    "config.json",
    "quantize_config.json",
    "measurement.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "configuration*.json",
    "README.md",
    "NOTICE*",
    ".gitattributes",
    MARKER,
)
MODEL_FOLDERS = {"vision": "*.safetensors", "additional_chat_templates": "*.jinja"}


def replaced(out: Path) -> Path:
    """Where a folder that is being replaced is kept until the new one has its name."""
    return out.with_name(out.name + REPLACED)


def check_folder(
    out: Path, nbytes: int, force: bool, inputs: Sequence[Path] = (), others: Sequence[Path] = ()
) -> None:
    """See that the model folder `out` can be written; raises OutputError.

    `inputs` are what the command reads; neither `out` nor a folder beside it that is used on the way,
    `others` among them, may be or hold any of it, whatever `force` says.
    """
    check_place(out, REPLACED)
    for folder in (out, part_of(out), replaced(out), *others):
        check_holds_no_input(folder, inputs)
    found = look(out)
    if found is not None and stat.S_ISLNK(found.st_mode):
        raise OutputError("is a link", where=out, hint="Give the name that it leads to, or remove the link")
    if found is not None and not _is_empty(out):
        if not force:
            raise OutputError("exists already", where=out, hint="Give --force to replace it")
        check_replaceable(out)
    check_ours(part_of(out), "part")
    check_ours(replaced(out), "replaced")
    check_room(out.parent, nbytes)


def check_replaceable(out: Path) -> None:
    """Raises OutputError unless `out` is a model folder that holds nothing but a model."""
    if not out.is_dir() or not (out / "config.json").is_file():
        raise OutputError("is not a model folder", where=out, hint="Give --out another name, or remove it")
    for name in _foreign(out):
        raise OutputError(
            "holds more than a model, so it is not replaced",
            where=out,
            why=f"No model that dsconvert writes has {name!r}",
            hint="Move that elsewhere, or give --out another name",
        )


def _foreign(out: Path) -> Iterator[str]:
    """What a model folder holds besides a model."""
    for name, folder in _entries(out):
        known = MODEL_FOLDERS if folder else MODEL_FILES
        if not any(fnmatchcase(name, pattern) for pattern in known):
            yield name
        elif folder:
            pattern = MODEL_FOLDERS[name]
            inside = _entries(out / name)
            yield from (f"{name}/{n}" for n, deeper in inside if deeper or not fnmatchcase(n, pattern))


def check_ours(folder: Path, kind: str, old: Callable[[Path], bool] = lambda folder: False) -> None:
    """Raises OutputError unless nothing is there, an empty folder, or one of ours of this `kind`.

    `old` knows the folders of ours that have no marker.
    """
    found = look(folder)
    if found is None:
        return
    if not stat.S_ISDIR(found.st_mode):
        raise not_ours(folder)
    if not (_is_empty(folder) or marked(folder, kind) or old(folder)):
        raise not_ours(folder)


def claim(folder: Path, kind: str, old: Callable[[Path], bool] = lambda folder: False) -> int:
    """Make `folder` if it does not exist, lock and mark it for this process; returns the lock's descriptor.

    Raises OutputError for what is not ours, see `check_ours`, and when another process is at work there.
    """
    check_ours(folder, kind, old)
    try:
        with suppress(FileExistsError):
            folder.mkdir()
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise OutputError("cannot be written", where=folder, why=error.strerror or str(error)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        check_ours(folder, kind, old)
        if not os.path.samestat(os.fstat(lock), os.lstat(folder)):
            raise BlockingIOError  # its owner removed it between our look and our lock
        mark(folder, kind)
    except OSError as error:
        os.close(lock)
        busy = isinstance(error, BlockingIOError | FileNotFoundError)
        raise OutputError(
            "another process is at work here" if busy else "cannot be written",
            where=folder,
            why="" if busy else error.strerror or str(error),
            hint="Wait for it, or choose another --out" if busy else "",
        ) from None
    except BaseException:
        os.close(lock)
        raise
    return lock


def mark(folder: Path, kind: str) -> None:
    """Say in the folder what it is."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(folder / MARKER, flags, 0o666), "w", encoding="utf-8") as file:
        json.dump({"dsconvert": kind, "note": "made by dsconvert, which removes this folder"}, file)


def marked(folder: Path, kind: str) -> bool:
    """Whether the folder says that it is ours, and of this kind."""
    try:
        file = os.open(folder / MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        value = json.loads(os.read(file, 4096))
    except (OSError, ValueError, RecursionError):
        return False
    finally:
        os.close(file)
    return isinstance(value, dict) and value.get("dsconvert") == kind


def clear(folder: Path) -> None:
    """Remove what a killed run left in a claimed folder; links in it are removed, not followed."""
    for name, is_folder in _entries(folder):
        if is_folder:
            shutil.rmtree(folder / name)
        elif name != MARKER:
            (folder / name).unlink()


def remove(folder: Path, kind: str) -> None:
    """Remove a folder of ours; what is none of ours stays, and so does what cannot be removed."""
    found = look(folder)
    if found is not None and stat.S_ISDIR(found.st_mode) and marked(folder, kind):
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            left.append(folder)


@contextmanager
def model_folder(out: Path, nbytes: int, force: bool, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """An empty `<out>.part` that becomes `out` on success and is removed on failure."""
    check_folder(out, nbytes, force, inputs)
    part = part_of(out)
    lock = claim(part, "part")
    try:
        clear(part)
        yield part
        for file in part.iterdir():
            _sync(file)
        _sync(part)
        publish(part, out, force)
    except OSError as error:
        raise write_error(out, error) from error
    finally:
        remove(part, "part")
        os.close(lock)


@contextmanager
def kept_folder(folder: Path, kind: str, resume: bool) -> Iterator[None]:
    """A folder of ours for another program: removed on success, kept after an error, for `resume`."""
    lock = claim(folder, kind)
    try:
        if not resume:
            clear(folder)
        yield
        remove(folder, kind)
    except BaseException:
        left.append(folder)
        raise
    finally:
        os.close(lock)


def publish(part: Path, out: Path, force: bool) -> None:
    """Rename `part` to `out`; what `out` was is kept aside until then."""
    aside = replaced(out)
    check_ours(aside, "replaced")
    remove(aside, "replaced")
    with suppress(OSError):
        aside.rmdir()  # an empty one
    old = look(out) is not None
    if old and not _is_empty(out):
        if not force:
            raise OutputError("appeared while its content was made", where=out, hint="Give --force")
        check_replaceable(out)
    if old:
        mark(out, "replaced")  # so that it is known for ours if this run is killed now
        os.replace(out, aside)
    try:
        os.replace(part, out)
    except OSError:
        if old:
            os.replace(aside, out)
            (out / MARKER).unlink(missing_ok=True)
        raise
    (out / MARKER).unlink(missing_ok=True)  # last: a part without it would be nobody's
    sync_folder(out.parent)
    remove(aside, "replaced")


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """The names in a folder, and which are folders; a link is none."""
    with os.scandir(folder) as entries:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or but a marker that was not written in time."""
    if not folder.is_dir():
        return False
    try:
        names = [name for name, _ in _entries(folder)]
    except OSError as error:
        raise OutputError("cannot be read", where=folder, why=error.strerror or str(error)) from None
    return not names or (names == [MARKER] and (folder / MARKER).lstat().st_size == 0)


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
