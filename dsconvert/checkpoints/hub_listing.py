"""What the hub says that a model's repository holds, at the commit that its revision is now."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urljoin

from dsconvert.checkpoints.hub_model import Repository
from dsconvert.checkpoints.remote_file import MOVED, REDIRECTS, Traffic, pause, refused
from dsconvert.errors import CheckpointError, UsageError
from dsconvert.network import TEMPORARY, Lost, Patience, answer, asked_pause, finish, host, origin
from dsconvert.reading import as_object, decoded, parse_json

LIMIT = 64 << 20  # bytes; a repository of 10,000 files needs some 3 MB


@dataclass(frozen=True)
class Hub:
    """How the hub is asked: its address, the headers with the token, patience, and what is counted."""

    endpoint: str
    headers: Mapping[str, str] = field(repr=False)
    patience: Patience = field(default_factory=Patience)
    traffic: Traffic = field(default_factory=Traffic)
    ended: threading.Event = field(default_factory=threading.Event, repr=False)


def the_hub() -> Hub:
    """The hub that huggingface_hub is set up for, with its token; UsageError where it is to be offline."""
    import huggingface_hub.utils as client
    from huggingface_hub import constants

    from dsconvert import __version__

    if constants.HF_HUB_OFFLINE:
        raise UsageError(
            "--remote reads over the network, and HF_HUB_OFFLINE is set",
            hint="Unset it, or leave --remote out: what is in the local cache is then read",
        )
    make = getattr(client, "build_hf_headers")  # noqa: B009 - its types leave it out
    headers = make(library_name="dsconvert", library_version=__version__)
    return Hub(constants.ENDPOINT, headers, Patience(silence=float(constants.HF_HUB_DOWNLOAD_TIMEOUT)))


@dataclass(frozen=True)
class Listing:
    """A repository's files at a commit: their sizes, -1 where none is said, and the sha256 of big ones."""

    repository: Repository
    commit: str
    sizes: Mapping[str, int]
    digests: Mapping[str, str]

    @property
    def digest(self) -> str:
        """What the list is known by: names, sizes and digests."""
        text = repr([(name, self.sizes[name], self.digests.get(name)) for name in sorted(self.sizes)])
        return hashlib.sha256(text.encode()).hexdigest()


def list_files(hub: Hub, repository: Repository) -> Listing:
    """The files of a repository at the commit that its revision is now; raises CheckpointError."""
    where = f"{hub.endpoint}/api/models/{repository.name}"
    if repository.revision is not None:
        where += f"/revision/{quote(repository.revision, safe='')}"
    value = _ask(hub, f"{where}?blobs=true", repository)
    commit, siblings = value.get("sha"), value.get("siblings")
    if not isinstance(commit, str) or not commit.isalnum() or not isinstance(siblings, list):
        raise CheckpointError(
            f"{host(hub.endpoint)} does not list its files as the hub does",
            where=repository,
            hint="Check HF_ENDPOINT",
        )
    files = {f["rfilename"]: f for f in siblings if isinstance(f, dict) and _is_name(f.get("rfilename"))}
    big = {name: f["lfs"] for name, f in files.items() if isinstance(f.get("lfs"), dict)}
    sizes = {name: f.get("size", big.get(name, {}).get("size", -1)) for name, f in files.items()}
    digests = {name: f["sha256"] for name, f in big.items() if isinstance(f.get("sha256"), str)}
    return Listing(repository, commit, {n: s if type(s) is int else -1 for n, s in sizes.items()}, digests)


def _is_name(name: object) -> bool:
    """Whether it can be a file inside of a folder, and nowhere else."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name:
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) < 256 for part in name.split("/"))


def _ask(hub: Hub, url: str, repository: Repository) -> dict[str, Any]:
    """The JSON object at an address of the hub, asked for again while the hub is busy or out of reach."""
    tries = 0
    while True:
        try:
            text = decoded(_body(hub, url, repository), repository)
            return as_object(parse_json(text, repository), repository)
        except Lost as lost:
            tries += 1
            pause(repository, tries, lost, hub.patience, hub.traffic, hub.ended)


def _body(hub: Hub, url: str, repository: Repository) -> bytes:
    """The body of an answer; a repository that was renamed is followed to its new name."""
    for _ in range(REDIRECTS):
        headers = {**hub.headers, "Accept-Encoding": "identity"}
        with answer(url, headers, hub.patience.silence) as found:
            hub.traffic.count(answers=1)
            if found.status == 200:
                body = bytearray()
                for piece in found.pieces:
                    hub.traffic.count(len(piece))
                    body += piece
                    if len(body) > LIMIT:
                        break
                return bytes(body)
            finish(found)
            said = f"{host(url)} answers with status {found.status}"
            if found.status in TEMPORARY:
                raise Lost(said, asked_pause(found.headers))
            target = urljoin(url, found.headers.get("location", ""))
            if found.status not in MOVED or origin(target) != origin(url):
                raise refused(repository, found.status, found.headers.get("x-error-code", ""), said)
            url = target
    raise refused(repository, 310, "", "It is sent from one address to the next")
