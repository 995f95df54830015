"""A model on the hub that is read where it is: its weights by ranges, small files from a temporary folder.

The folder is laid out as the hub's cache is, and goes when the model is closed.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dsconvert.checkpoints.hub_listing import Hub, Listing, list_files, the_hub
from dsconvert.checkpoints.hub_model import Repository, is_small
from dsconvert.checkpoints.read_ahead import ReadAhead
from dsconvert.checkpoints.remote_file import DOWNLOAD, RemoteFile, Traffic
from dsconvert.checkpoints.safetensors_reader import Stored, fetched_safetensors
from dsconvert.checkpoints.source_files import SourceFile
from dsconvert.checkpoints.weight_files import SAFETENSORS, TORCH, Read
from dsconvert.errors import CheckpointError
from dsconvert.network import host
from dsconvert.reading import TOKENIZER

HEAD = 256 << 10  # bytes that are read of a weight file first: most headers are in it
AT_ONCE = 8  # small files that are fetched together

opened: list[RemoteModel] = []  # those of this process, for the line that says what was read of them


@dataclass(frozen=True, eq=False)
class RemoteModel:
    """A repository at one commit: its small files in `folder`, what reads the weight files, by name.

    `digests` are the sha256 of weight files as the hub states them; `state` is the whole list of files.
    """

    repository: Repository
    folder: Path
    weights: Mapping[str, Read]
    digests: Mapping[Path, str]
    state: SourceFile
    hub: Hub
    ahead: ReadAhead = field(repr=False)
    tidy: Callable[[], Any] = field(repr=False)

    @property
    def traffic(self) -> Traffic:
        """What was read of it so far."""
        return self.hub.traffic

    def close(self) -> None:
        """Read no more and remove the folder; may be called again."""
        self.hub.ended.set()
        self.ahead.close()
        self.tidy()


def open_remote(repository: Repository) -> RemoteModel:
    """Ask the hub for a model's files and fetch the small ones; raises CheckpointError, UsageError."""
    hub, ahead = the_hub(), ReadAhead()
    listing = list_files(hub, repository)
    files = {
        name: remote_file(hub, listing, name) for name in listing.sizes if is_small(name) or is_weight(name)
    }
    top = Path(tempfile.mkdtemp(prefix="dsconvert-"))
    tidy = weakref.finalize(ahead, shutil.rmtree, top, ignore_errors=True)
    # Named as in the cache: an output's keys are taken from it.
    folder = top / f"models--{repository.name.replace('/', '--')}" / "snapshots" / listing.commit
    inside = [name for name in files if is_weight(name)]
    weights = {name: partial(read_weights, files[name], ahead) for name in inside}
    digests = {folder / name: _digest(listing, name) for name in inside}
    model = RemoteModel(repository, folder, weights, digests, _state(hub, listing), hub, ahead, tidy)
    opened.append(model)
    fetch_small(folder, {name: file for name, file in files.items() if is_small(name)})
    return model


def is_weight(name: str) -> bool:
    """Whether a file of a repository may hold weights of its model."""
    return "/" not in name and name.endswith((SAFETENSORS.suffix, TORCH.suffix))


def remote_file(hub: Hub, listing: Listing, name: str, instead: str = DOWNLOAD) -> RemoteFile:
    """One file of a repository at the commit of the list; CheckpointError where its size is not stated."""
    if listing.sizes[name] < 0:
        why = f"{host(hub.endpoint)} does not say how big it is"
        raise CheckpointError(
            "cannot be read by ranges", where=f"{listing.repository}/{name}", why=why, hint=instead
        )
    url = f"{hub.endpoint}/{listing.repository.name}/resolve/{listing.commit}/{quote(name)}"
    return RemoteFile(
        f"{listing.repository}/{name}", url, listing.commit, listing.sizes[name],
        listing.digests.get(name, ""), hub.headers, hub.patience, hub.traffic, hub.ended, instead,
    )  # fmt: skip


def fetch_small(folder: Path, files: Mapping[str, RemoteFile]) -> None:
    """Write small files into a folder, each read whole; raises CheckpointError."""

    def fetch(name: str) -> None:
        file, target = files[name], folder / name
        if file.size > TOKENIZER:
            why = f"{file.size:,} bytes, more than any such file has"
            raise CheckpointError("is too big", where=file.name, why=why, hint=DOWNLOAD)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read(0, file.size))

    folder.mkdir(parents=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(fetch, files))


def read_weights(file: RemoteFile, ahead: ReadAhead, path: Path) -> dict[str, Stored]:
    """The tensors of a weight file, of which the header alone is read; raises CheckpointError."""
    if path.suffix != SAFETENSORS.suffix:
        raise CheckpointError(
            "is not read over the network",
            where=file.name,
            why="A .bin file is a zip archive of pickles; --remote reads safetensors",
            hint=DOWNLOAD,
        )
    head = file.read(0, min(HEAD, file.size))

    def read(start: int, stop: int) -> bytes:
        return (
            head[start:stop] if stop <= len(head) else head[start:] + file.read(max(start, len(head)), stop)
        )

    def span(first: int, end: int) -> Callable[[int, int], bytes | memoryview]:
        return lambda start, stop: ahead.read(file, first + start, first + stop, (first, end))

    return fetched_safetensors(Path(file.name), file.size, read, span)


def _digest(listing: Listing, name: str) -> str:
    """The sha256 of a file; of one that the hub states none of, what stands for it: commit and name."""
    stands_for = hashlib.sha256(f"{listing.commit}/{name}".encode()).hexdigest()
    return listing.digests.get(name, stands_for)


def _state(hub: Hub, listing: Listing) -> SourceFile:
    """The repository as a file that is looked at again before an output is published."""
    fixed = Repository(listing.repository.name, listing.commit)

    def again() -> SourceFile:
        return _state(hub, list_files(hub, fixed))

    return SourceFile(Path(str(fixed)), 0, 0, 0, 0, listing.digest, again)
