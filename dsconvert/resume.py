"""What a run has finished so far: a file and a record for each block, so that a killed run can go on.

The folder `<out>.state` holds `job.json`, which says of what run it is, and for each finished block a
safetensors file and a record. The record is written last, so a block counts only when its file is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconvert.errors import CheckpointError, OutputError
from dsconvert.reading import RECORD, open_regular, read_object
from dsconvert.safetensors_header import Stored, read_safetensors
from dsconvert.safetensors_writer import Piece, write_safetensors

JOB = "job.json"


@dataclass(frozen=True)
class State:
    """The blocks that are finished; `folder` is this process's alone while it is open."""

    folder: Path

    @property
    def begun(self) -> bool:
        """Whether a block is finished, or anything else is kept."""
        return any(path.name != JOB for path in self.folder.glob("*.json"))

    def keep(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep something else that took time, under a name of its own."""
        self._publish(self.folder / f"{name}.json", value)

    def kept(self, name: str) -> dict[str, Any] | None:
        """What was kept under that name, or None."""
        return _read(self.folder / f"{name}.json")

    def records(self) -> list[dict[str, Any]]:
        """The records of the blocks finished, from block 0 on; OutputError for one that was changed."""
        found: list[dict[str, Any]] = []
        while (record := _read(path := self._record(len(found)))) is not None:
            block = self._block(len(found))
            if not block.exists() or _digest(block) != record.get("sha256"):
                raise OutputError(
                    "is not as it was written",
                    where=block,
                    hint=f"Remove {path.name}, so that --resume makes this block again",
                )
            found.append(record)
        return found

    def save(self, index: int, pieces: Mapping[str, Piece], record: Mapping[str, Any]) -> None:
        """Keep a finished block: its packed tensors, and a record of how it went."""
        block = self._block(index)
        try:
            write_safetensors(block, pieces)
            self._publish(self._record(index), {"sha256": _digest(block), **record})
        except OSError as error:
            raise OutputError("cannot be written", where=block, why=error.strerror or str(error)) from error

    def tensors(self, index: int) -> dict[str, Stored]:
        """The packed tensors of a finished block."""
        return read_safetensors(self._block(index))

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Forget what is there, and say of what run the following is."""
        for path in self.folder.iterdir():
            path.unlink()
        self._publish(self.folder / JOB, identity)

    def identity(self) -> dict[str, Any] | None:
        """What `begin` was told; None in a new folder."""
        return _read(self.folder / JOB)

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _record(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def _publish(self, path: Path, value: Mapping[str, Any]) -> None:
        part = path.with_name(path.name + ".part")
        with part.open("w", encoding="utf-8") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def state_folder(out: Path) -> Path:
    """Where the state of a run that writes `out` is kept."""
    return out.with_name(out.name + ".state")


def check_state(out: Path, resume: bool, force: bool) -> None:
    """See that no unfinished run is thrown away unasked; raises OutputError."""
    if State(state_folder(out)).begun and not resume and not force:
        raise OutputError(
            "an unfinished run was left here",
            where=state_folder(out),
            hint="Give --resume to go on with it, or --force to begin anew",
        )


@contextmanager
def open_state(out: Path, identity: Mapping[str, Any], resume: bool) -> Iterator[State]:
    """The state of the run that writes `out`: with `resume` what is there, else none yet.

    It stays after an error where a block is finished, and is removed when the body ends. Raises OutputError
    when another process holds it, CheckpointError when what is there was begun with another model, options
    or calibration.
    """
    folder = state_folder(out)
    lock = _locked(folder)
    try:
        state = State(folder)
        known = state.identity()
        if known is None or not resume:
            state.begin(identity)
        elif known != identity:
            raise _other_run(folder, known, identity)
        yield state
        shutil.rmtree(folder)
    except BaseException:
        if not State(folder).begun:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _read(path: Path) -> dict[str, Any] | None:
    """A record as it was kept, None where there is none; raises OutputError for one that was changed."""
    if not os.path.lexists(path):
        return None
    return read_object(path, RECORD, OutputError, f"Remove {path.name}, so that --resume makes it again")


def _locked(folder: Path) -> int:
    try:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError("cannot be written", where=folder, why=error.strerror or str(error)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise OutputError(
            "another process is at work here", where=folder, hint="Wait for it, or choose another --out"
        ) from None
    return lock


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
