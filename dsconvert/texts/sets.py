"""The texts that calibration and evaluation take by name: c4, wikitext2, the built-in one, local files.

Each named set is one file of the hub for calibration and one for evaluation, as the GPTQ literature takes
them. A local folder in the same layout, or one of those files, is read in the same way.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsconvert.errors import CheckpointError, ConversionError, UsageError, quoted
from dsconvert.events import Event, Step, Warn
from dsconvert.texts import builtin as builtin_text
from dsconvert.texts import files as text_files
from dsconvert.texts import hub_files
from dsconvert.texts.conversations import Message, read_chats, without_tools
from dsconvert.texts.files import Skipped, Texts

Split = Literal["calibration", "evaluation"]
# documents: windows from long documents; stream: windows from one joined text; packed: documents end to end.
Method = Literal["documents", "stream", "packed"]
BUILTIN = "builtin"
BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class NamedSet:
    """A set on the hub: which file is for what, and how the literature draws windows from it."""

    name: str
    repository: str
    files: dict[Split, str]
    method: Method


SETS = (
    NamedSet(
        "c4",
        "allenai/c4",
        {
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
        "documents",
    ),
    NamedSet(
        "wikitext2",
        "Salesforce/wikitext",
        {
            "calibration": "wikitext-2-raw-v1/train-00000-of-00001.parquet",
            "evaluation": "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        },
        "stream",
    ),
)
NAMES = (*(known.name for known in SETS), BUILTIN)


@dataclass(frozen=True)
class TextSet:
    """A text and where it comes from.

    `kinds` names each document's kind where a set mixes several; `separator` stands between documents when
    they are joined; `notes` are what a user should know; `provenance` is JSON.
    """

    name: str
    split: Split
    documents: Texts
    method: Method
    provenance: dict[str, Any]
    notes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    separator: str = BLANK_LINE


def load_text(
    name: str, split: Split, *, offline: bool = False, fallback: bool = True, column: str = ""
) -> Generator[Event, None, TextSet]:
    """The text called `name`: "c4", "wikitext2", "builtin", a file or a folder.

    A folder holds text files, or is a mirror in the layout of a set's repository; `column` is the one of
    its rows that is taken. Yields what is going on.
    With `fallback` the built-in text takes the place of a named set that cannot be fetched because there is
    no network (or `offline`), with a Warn and a note. Raises UsageError for a name that stands for nothing,
    hub_files.Unreachable without `fallback`, CheckpointError for a file of no use.
    """
    if column and name in NAMES:
        raise UsageError(f"--calib-column is for a file of rows, {name} is a known text")
    if name == BUILTIN:
        return builtin(split)
    for known in SETS:
        if name == known.name:
            return (yield from _named(known, split, offline, fallback))
    found = _local(name, split, column)
    yield from map(Warn, found.notes)
    return found


def builtin(split: Split, notes: tuple[str, ...] = ()) -> TextSet:
    """One part of the built-in text; the parts share no document."""
    documents = builtin_text.builtin_documents(split)
    packed = text_files.pack(document.text for document in documents)
    kinds = tuple(document.name.partition("/")[0] for document in documents)
    provenance = {
        "source": BUILTIN,
        "part": split,
        "python": platform.python_version(),
        "sha256": hashlib.sha256(packed.data).hexdigest(),
    }
    return TextSet(BUILTIN, split, packed, "packed", provenance, notes, kinds)


def chats(path: Path, render: Callable[[list[Message]], str], column: str = "") -> TextSet:
    """Conversations of a file of rows as the model's chat template writes them, by `render`.

    One that the template refuses goes without its calls of tools, where it has some; a note counts those.
    Raises CheckpointError for a file that cannot be used, UsageError for a conversation that the template
    refuses or a file without any.
    """

    skipped, bare = Skipped(), list[int]()

    def rendered() -> Iterator[str]:
        for number, messages in enumerate(read_chats(path, column, skipped), 1):
            try:
                yield render(messages)
            except ConversionError as error:
                less = without_tools(messages)
                if less == messages or not less:
                    raise UsageError(
                        f"the chat template refuses conversation {number}", where=path, why=str(error)
                    ) from None
                bare.append(number)
                yield render(less)

    packed = _filled(rendered(), path)
    notes = skipped.notes(path.name)
    if bare:
        share = f"{len(bare)} of {len(packed)} conversations"
        notes += (f"{path.name}: the template refuses calls of tools, {share} go without",)
    provenance = {"source": "chat", "files": [_fingerprint(path, path.parent)]}
    return TextSet(path.name, "calibration", packed, "packed", provenance, notes, separator="")


def _named(known: NamedSet, split: Split, offline: bool, fallback: bool) -> Generator[Event, None, TextSet]:
    name = known.files[split]
    if name.endswith(text_files.PARQUET):
        text_files.parquet_reader()  # say what is missing before anything is fetched
    try:
        file = yield from hub_files.fetch(known.repository, name, offline=offline)
    except hub_files.Unreachable as error:
        if not fallback:
            raise
        note = f"{known.name} was asked for; the built-in text is used: {error}"
        yield Warn(note)
        return builtin(split, (note,))
    yield Step(f"reading {known.repository}/{name}")
    about = {"source": "hub", "repository": known.repository, "revision": file.commit}
    return _read_named(known, split, file.path, about)


def _read_named(known: NamedSet, split: Split, path: Path, about: dict[str, Any]) -> TextSet:
    packed = _filled(text_files.read_documents(path), path)
    provenance = {**about, "files": [_fingerprint(path, path.parent)]}
    return TextSet(known.name, split, packed, known.method, provenance)


def _local(name: str, split: Split, column: str = "") -> TextSet:
    path = Path(name)
    try:
        folder, file = os.path.isdir(path), os.path.isfile(path)
    except (OSError, ValueError):
        folder = file = False
    if not folder and not file:
        raise UsageError(
            f"{quoted(name)} is neither a known text nor a file or folder here",
            hint=f"Known: {', '.join(NAMES)}",
        )
    for known in () if column else SETS:
        if file and path.name in {Path(other).name for other in known.files.values()}:
            return _read_named(known, split, path, {"source": "local"})
        if folder and any(os.path.isfile(path / other) for other in known.files.values()):
            return _mirror(known, split, path)
    return _files([path] if file else _listed(path), path, split, column)


def _mirror(known: NamedSet, split: Split, folder: Path) -> TextSet:
    """A folder in the layout of the set's repository."""
    path = folder / known.files[split]
    if not path.is_file():
        raise CheckpointError(
            f"is a mirror of {known.name} without its file for {split}",
            where=folder,
            why=f"{known.files[split]} is missing",
            hint="Add the file, or choose another text",
        )
    return _read_named(known, split, path, {"source": "mirror"})


def _listed(folder: Path) -> list[Path]:
    """The files of a folder, and of those in it, that hold text by their names; hidden ones are left out."""
    found = [path for path in folder.rglob("*") if text_files.is_text(path) and os.path.isfile(path)]
    shown = [path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
    if not shown:
        raise UsageError(
            "holds no text files", where=folder, hint=f"Give one of: {', '.join(text_files.SUFFIXES)}"
        )
    return sorted(shown, key=lambda path: path.relative_to(folder).as_posix())


def _files(paths: Sequence[Path], given: Path, split: Split, column: str) -> TextSet:
    skipped = {path: Skipped() for path in paths}
    documents = (
        document for path in paths for document in text_files.read_documents(path, column, skipped[path])
    )
    packed = _filled(documents, given)
    notes = tuple(note for path in paths for note in skipped[path].notes(path.name))
    root = given if given.is_dir() else given.parent
    provenance = {"source": "local", "files": [_fingerprint(path, root) for path in paths]}
    return TextSet(given.name or str(given), split, packed, "packed", provenance, notes)


def _filled(documents: Iterator[str], where: Path) -> Texts:
    packed = text_files.pack(documents)
    if not packed.data or packed.data.isspace():
        raise UsageError("holds no text", where=where, why="it is empty", hint="Give a file with text in it")
    return packed


def _fingerprint(path: Path, root: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "sha256": digest}
