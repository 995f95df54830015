"""A GGUF file on the hub or at a URL, of which the header alone is read."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from converters.gguf.parse import SPLIT, GGUFFile, Source, open_gguf
from dsconvert.checkpoints.remote_address import Shelf
from dsconvert.errors import CheckpointError

HEAD = 1 << 20  # bytes that are read first
SHOWN = 8  # files of a repository that a message lists


def open_remote(shelf: Shelf, name: str) -> GGUFFile:
    """The file `name` of a shelf, or its only one; of a split set every file's header; CheckpointError."""
    name = name or the_only_one(shelf)

    def source(path: Path) -> Source:
        file = shelf.open(str(PurePosixPath(name).with_name(path.name)))
        return Source(path, bytearray(file.read(0, min(HEAD, file.size))), file.size, file.read)

    return open_gguf(Path(shelf.place, name), source)


def the_only_one(shelf: Shelf) -> str:
    """The GGUF file of a shelf that holds one, or one split set; CheckpointError for none and for several."""
    names = [name for name in shelf.names if name.endswith(".gguf")]
    splits = {name: SPLIT.fullmatch(name) for name in names}
    first = [name for name, split in splits.items() if split is None or split[2] == "00001"]
    if len(first) == 1:
        return first[0]
    if not names:
        raise CheckpointError(
            "holds no GGUF file",
            where=shelf.place,
            why=f"It holds {len(shelf.names)} files of other kinds",
            hint=f"`dsconvert memory {shelf.place}` says what a checkpoint takes; inspect shows its folder",
        )
    more = f" and {len(first) - SHOWN} more" if len(first) > SHOWN else ""
    raise CheckpointError(
        f"holds {len(first)} GGUF files",
        where=shelf.place,
        why=", ".join(first[:SHOWN]) + more,
        hint=f"Give one of them: {shelf.place}/{(first or names)[0]}",
    )
