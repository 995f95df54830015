"""What a run has finished so far: a file and a record for each block, so that a killed run can go on.

The folder `<out>.state` holds `job.json`, which says of what run it is, and for each finished block a
safetensors file and a record. The record is written last, so a block counts only when its file is whole.
A folder of that name that holds anything else is not ours, and is left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsconvert.checkpoints.marked_folders import MARKER, check_ours, claim
from dsconvert.checkpoints.output_files import sync_folder, write_error
from dsconvert.checkpoints.output_plan import check_place, left, look
from dsconvert.checkpoints.safetensors_reader import Stored, read_safetensors
from dsconvert.checkpoints.safetensors_writer import (
    Piece,
    from_file,
    not_through_a_link,
    write_safetensors,
)
from dsconvert.checkpoints.source_files import SourceFile, seen
from dsconvert.errors import CheckpointError, OutputError, short
from dsconvert.reading import RECORD, open_regular, read_object

JOB = "job.json"
KIND, SUFFIX = "state", ".state"
NAMES = re.compile(r"(job|(block|measured)-\d{5})\.json(\.part)?|block-\d{5}\.(safetensors|pieces)")
Put = Callable[[Piece], Piece]
KEYS = {"model", "options", "calibration", "version"}  # of job.json, whatever the format


@dataclass(frozen=True)
class State:
    """The blocks that are finished; `folder` is this process's alone while it is open.

    `known` are the digests and files of the blocks that were written or read by it: none is hashed twice.
    """

    folder: Path
    known: dict[int, tuple[str, SourceFile | None]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def begun(self) -> bool:
        """Whether a block is finished, or anything else is kept."""
        return any(path.name != JOB and NAMES.fullmatch(path.name) for path in self.folder.glob("*.json"))

    def keep(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep something else that took time, under a name of its own."""
        self._publish(self.folder / f"{name}.json", value)

    def kept(self, name: str) -> dict[str, Any] | None:
        """What was kept under that name, or None."""
        return _read(self.folder / f"{name}.json")

    def changed(self, name: str, error: Exception) -> OutputError:
        """The error for a record that cannot be what was written."""
        return OutputError(
            "is not as it was written",
            where=self.folder / f"{name}.json",
            why=f"{type(error).__name__}: {short(error)}",
            hint=f"Remove {name}.json, so that --resume makes it again",
        )

    def records(self) -> list[dict[str, Any]]:
        """The records of the blocks finished, from block 0 on; OutputError for one that was changed."""
        found: list[dict[str, Any]] = []
        while (record := _read(path := self._record(len(found)))) is not None:
            block = self._block(len(found))
            now, sha256 = seen(block), str(record.get("sha256"))
            if not now or (self.known.get(len(found)) != (sha256, now) and _digest(block) != sha256):
                raise _changed(block, path)
            self.known[len(found)] = sha256, now
            if not _sound(record.get("linears")):
                raise _changed(path, path)
            found.append(record)
        return found

    def save(self, index: int, pieces: Mapping[str, Piece], record: Mapping[str, Any]) -> None:
        """Keep a finished block: its packed tensors, and a record of how it went."""
        block, digest = self._block(index), hashlib.sha256()
        try:
            self._record(index).unlink(missing_ok=True)  # of what a killed `forget` has left
            write_safetensors(block, pieces, seen=digest.update)
            self._publish(self._record(index), {"sha256": digest.hexdigest(), **record})
            self.known[index] = digest.hexdigest(), seen(block)
        except OSError as error:
            raise write_error(block, error) from error

    @contextmanager
    def spool(self, index: int) -> Iterator[Put]:
        """A verb that puts a tensor of a block under way on the disk, and gives what `save` reads it by.

        So a block of hundreds of experts is not in memory until it is saved. What a killed run leaves is
        written over, or removed with the rest.
        """
        path = self.folder / f"block-{index:05d}.pieces"

        def put(piece: Piece) -> Piece:
            start = file.tell()
            try:
                file.writelines(piece.chunks())
                file.flush()
            except OSError as error:
                raise write_error(path, error) from error
            return from_file(path, start, piece)

        with ExitStack() as stack:
            try:
                file = stack.enter_context(open(path, "wb", opener=not_through_a_link))
            except OSError as error:
                raise write_error(path, error) from error
            stack.callback(path.unlink, missing_ok=True)
            yield put

    def tensors(self, index: int) -> dict[str, Stored]:
        """The packed tensors of a finished block."""
        return read_safetensors(self._block(index))

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Remove the existing state and record which run the new one belongs to."""
        self.forget()
        self._publish(self.folder / JOB, identity)

    def forget(self) -> None:
        """Remove what is kept, no block before its record; nothing else is touched."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            if NAMES.fullmatch(path.name):
                path.unlink()

    def identity(self) -> dict[str, Any] | None:
        """The record that `begin` wrote; None in a new folder."""
        return _read(self.folder / JOB)

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _record(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def _publish(self, path: Path, value: Mapping[str, Any]) -> None:
        part = path.with_name(path.name + ".part")
        part.unlink(missing_ok=True)
        try:
            with part.open("x", encoding="utf-8") as file:
                json.dump(value, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            raise write_error(path, error) from error
        sync_folder(path.parent)


def state_folder(out: Path) -> Path:
    """Where the state of a run that writes `out` is kept."""
    return out.with_name(out.name + SUFFIX)


def check_state(out: Path, resume: bool, force: bool) -> None:
    """See that a state can be kept, and that no unfinished run is thrown away unasked; raises OutputError."""
    check_place(out, SUFFIX)
    folder = state_folder(out)
    check_ours(folder, KIND, _is_old)
    if look(folder) is not None:
        _check_names(folder)
    if State(folder).begun and not resume and not force:
        raise OutputError(
            "an unfinished run was left here",
            where=folder,
            hint="Give --resume to go on with it, or --force to begin anew",
        )


@contextmanager
def open_state(out: Path, identity: Mapping[str, Any], resume: bool) -> Iterator[State]:
    """The state of the run that writes `out`: with `resume` the existing one, else an empty one.

    It stays after an error where a block is finished, and is removed when the body ends. Raises OutputError
    when another process holds it, CheckpointError when the existing one was begun with another model, options
    or calibration.
    """
    folder = state_folder(out)
    lock = claim(folder, KIND, _is_old)
    state = State(folder)
    try:
        _check_names(folder)
        known = state.identity() if resume else None
        if known is None:
            state.begin(identity)
        elif known != identity:
            raise _other_run(folder, known, identity)
        yield state
        _remove(state)
    except BaseException:
        if state.begun:
            left.append(folder)
        else:
            _remove(state)
        raise
    finally:
        os.close(lock)


def _remove(state: State) -> None:
    """Remove the state; the folder too, unless somebody has put something into it."""
    with suppress(OSError):
        state.forget()
        if [path.name for path in state.folder.iterdir()] == [MARKER]:
            (state.folder / MARKER).unlink()
            state.folder.rmdir()


def _check_names(folder: Path) -> None:
    """Raises OutputError for anything in the folder that no state of ours holds."""
    for path in sorted(folder.iterdir()):
        known = NAMES.fullmatch(path.name) or path.name == MARKER
        if not known or not stat.S_ISREG(path.lstat().st_mode):
            raise OutputError(
                "holds what no state of a run holds",
                where=folder,
                why=f"It has {path.name[:80]!r}, and the folder is removed when the run has ended",
                hint="Move it elsewhere, or give --out another name",
            )


def _is_old(folder: Path) -> bool:
    """Whether the folder is a state as it was kept before there was a marker."""
    try:
        found = _read(folder / JOB)
    except OutputError:
        return False
    return found is not None and found.keys() >= KEYS


def _read(path: Path) -> dict[str, Any] | None:
    """A record as it was kept, None where there is none; raises OutputError for one that was changed."""
    if not os.path.lexists(path):
        return None
    again = "Give --force without --resume to begin anew"
    hint = again if path.name == JOB else f"Remove {path.name}, so that --resume makes it again"
    return read_object(path, RECORD, OutputError, hint)


def _sound(linears: Any) -> bool:
    """Whether a record's list of linears is one that `blockwise` has written."""
    return isinstance(linears, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and "fell_back" in one for one in linears
    )


def _changed(where: Path, record: Path) -> OutputError:
    hint = f"Remove {record.name}, so that --resume makes this block again"
    return OutputError("is not as it was written", where=where, hint=hint)


def _other_run(folder: Path, known: Mapping[str, Any], identity: Mapping[str, Any]) -> CheckpointError:
    keys = [key for key in {**known, **identity} if known.get(key) != identity.get(key)]
    differing = [f"{key} was {known.get(key)}, is {identity.get(key)}" for key in keys]
    return CheckpointError(
        f"was begun with another {', '.join(keys)}",
        where=folder,
        why="; ".join(differing),
        hint="Give what it was begun with, or --force without --resume to begin anew",
    )


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
