"""The files that a model is read from: what travels with the weights, where it may lie, whether it changed.

A conversion maps its source and takes hours: what was true when it was opened is asked for again before
anything is published.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from dsconvert.errors import CheckpointError
from dsconvert.reading import inside, open_regular

# What travels with the weights, as patterns of file names.
COMPANIONS = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*.j*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)
WEIGHTS = ("*.safetensors", "*.bin")
# Whose content goes into other files: a GGUF's keys, the config.json of a folder.
QUOTED = ("config.json", "README.md", "additional_chat_templates/*.jinja")


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when it was opened.

    One that is not on this disk has a `digest`, and `again` asks for what it is now.
    """

    path: Path
    size: int
    mtime_ns: int
    device: int
    inode: int
    digest: str = ""
    again: Callable[[], SourceFile | None] | None = field(default=None, compare=False, repr=False)


def remember(paths: Iterable[Path]) -> tuple[SourceFile, ...]:
    """The files among `paths` as they are now; a link counts as what it leads to."""
    return tuple(found for path in paths if (found := seen(path)) is not None)


def check_unchanged(files: Iterable[SourceFile]) -> None:
    """Raises CheckpointError that names the first file that is not as it was remembered."""
    for file in files:
        now = file.again() if file.again is not None else seen(file.path)
        if now == file:
            continue
        if now is None:
            what, why = "is gone", "It was there when the work began"
        elif now.size < file.size:
            what, why = "was cut short while it was read", f"It had {file.size:,} bytes, now {now.size:,}"
        else:
            what, why = "has changed while it was read", "The output would mix the old content and the new"
        raise CheckpointError(
            what, where=file.path, why=why, hint="Run the same command again when nothing writes there"
        )


def companions(source: Path) -> list[Path]:
    """The files of the source folder that travel with the weights, in order of their names."""
    found = {path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}
    return sorted(found)


def small_files(source: Path) -> list[Path]:
    """The files of a model folder whose content is carried into outputs, the weights apart."""
    quoted = {path for pattern in QUOTED for path in source.glob(pattern) if path.is_file()}
    return sorted({*companions(source), *quoted})


def weight_files(source: Path) -> list[Path]:
    """The files of a model folder that may hold its weights."""
    return sorted(path for pattern in WEIGHTS for path in source.glob(pattern))


def check_quotable(source: Path) -> None:
    """Raises CheckpointError where a file whose content goes into an output leads out of the folder.

    The licence is not among them: only a model folder is given a copy of it, see `check_companions`.
    """
    _check_inside(source, [path for path in small_files(source) if not fnmatchcase(path.name, "LICENSE*")])


def check_companions(source: Path) -> None:
    """Raises CheckpointError where a file that is to be copied leads out of the folder or cannot be read."""
    files = small_files(source)
    _check_inside(source, files)
    for path in files:
        try:
            open_regular(path).close()
        except OSError as error:
            raise _unreadable(path, error) from None


def copy(source: Path, target: Path) -> None:
    """Copy a file into a folder of ours; CheckpointError where the source is what fails."""
    try:
        file = open_regular(source)
    except OSError as error:
        raise _unreadable(source, error) from None
    with file, target.open("xb") as copied:
        shutil.copyfileobj(file, copied)


def _check_inside(folder: Path, files: Iterable[Path]) -> None:
    for path in files:
        if not inside(path, folder):
            raise CheckpointError(
                "is a link that leads out of the model folder",
                where=path,
                why=f"It leads to {os.path.realpath(path)}, and the output would hold that file's content",
                hint="If it belongs to the model, put a copy in its place: cp --remove-destination "
                "TARGET LINK; else remove the link",
            )


def seen(path: Path) -> SourceFile | None:
    """The file as it is now, None where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return SourceFile(path, status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        "cannot be read",
        where=path,
        why=error.strerror or str(error),
        hint="It goes into the output: make it readable, or remove it",
    )
