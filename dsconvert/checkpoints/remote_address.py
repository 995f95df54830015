"""Files that are read where they are, without a model around them: in a hub's repository, or at a URL."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urljoin, urlsplit

from dsconvert.checkpoints.hub_listing import Hub, list_files, the_hub
from dsconvert.checkpoints.hub_model import HOSTS, Repository, parse
from dsconvert.checkpoints.remote_file import MOVED, REDIRECTS, RemoteFile, Traffic, pause, refused
from dsconvert.checkpoints.remote_model import remote_file
from dsconvert.errors import CheckpointError, UsageError, quoted
from dsconvert.network import TEMPORARY, Lost, answer, asked_pause, finish, host, origin

# owner/name/FILE, owner/name@revision/FILE
HUB_FILE = re.compile(
    r"(?P<owner>[\w.-]{1,96})/(?P<name>[\w.-]{1,96})(@(?P<revision>[^@\s/]+))?/(?P<file>.+)"
)
PAGE = re.compile(r"/(blob|resolve|raw)/(refs/[^/]+/)?[^/]+/(?P<file>.+)")
WHOLE = re.compile(r"(/models)?/[^/]+/[^/]+(/tree/.*|/commit/.*)?/?")
INSTEAD = "Download the file, and give its path"


@dataclass(frozen=True)
class Shelf:
    """Files that lie side by side: their `names`, where those are known, and what opens one of them.

    `place` is what stands before a file's name in messages. `traffic` counts what is read of them.
    """

    place: str
    names: tuple[str, ...]
    open: Callable[[str], RemoteFile]
    traffic: Traffic


def shelf_of(text: str) -> tuple[Shelf, str] | None:
    """The files that a text is about, and the name of the one that it names, "" for none.

    It is "owner/name" of the hub, "owner/name/FILE", the address of a page or a file there, or an http(s) URL
    of another server; None for what may be on this disk. Raises UsageError, CheckpointError.
    """
    if os.path.lexists(text):
        return None
    text = f"https://{text}" if text.startswith(tuple(f"{name}/" for name in HOSTS)) else text
    url = urlsplit(text)
    if url.scheme in ("http", "https"):
        try:
            repository = parse(text)
        except UsageError:
            repository = None
        page, whole = PAGE.search(url.path), WHOLE.fullmatch(url.path)
        if repository is None and url.netloc not in HOSTS:
            return _elsewhere(text)
        if repository is None or not (page or whole):
            raise UsageError(f"{quoted(text)} is no file of a model", hint=f"Give OWNER/NAME/FILE. {INSTEAD}")
        return _of_hub(repository, unquote(page["file"]) if page else "")
    if os.path.lexists(text.partition("/")[0]):  # a path on this disk, misspelt
        return None
    text = text.removeprefix("hf://")
    if named := HUB_FILE.fullmatch(text):
        return _of_hub(Repository(f"{named['owner']}/{named['name']}", named["revision"]), named["file"])
    repository = None if PurePosixPath(text).suffix == ".gguf" else parse(text)
    return None if repository is None else _of_hub(repository, "")


def _of_hub(repository: Repository, file: str) -> tuple[Shelf, str]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        what = f"{quoted(str(repository))} is not here, and HF_HUB_OFFLINE is set"
        raise UsageError(what, hint=f"Unset it. {INSTEAD}")
    hub = the_hub()
    listing = list_files(hub, repository)
    if file and file not in listing.sizes:
        near = [name for name in listing.sizes if Path(name).suffix == Path(file).suffix]
        why = f"It has {len(near)} of this kind" + (f", for example {quoted(near[0])}" if near else "")
        raise CheckpointError(f"holds no file {quoted(file)}", where=repository, why=why)
    names = tuple(sorted(listing.sizes))
    return Shelf(
        str(repository), names, lambda name: remote_file(hub, listing, name, INSTEAD), hub.traffic
    ), file


def _elsewhere(url: str) -> tuple[Shelf, str]:
    hub = Hub(url, {})  # another server: no token of the hub's goes there
    folder, _, name = urlsplit(url).path.rpartition("/")
    shelf = Shelf(
        host(url) + folder, (), lambda name: sized(hub, urljoin(url, quote(name) + _query(url))), hub.traffic
    )
    return shelf, unquote(name)


def _query(url: str) -> str:
    query = urlsplit(url).query
    return f"?{query}" if query else ""


def sized(hub: Hub, url: str) -> RemoteFile:
    """The file at a URL, with the size that its server states when a byte of it is asked for."""
    name = host(url) + unquote(urlsplit(url).path)
    tries = 0
    while True:
        try:
            size = _size(hub, url, name)
        except Lost as lost:
            tries += 1
            pause(name, tries, lost, hub.patience, hub.traffic, hub.ended, INSTEAD)
        else:
            return RemoteFile(
                name, url, "", size, "", {}, hub.patience, hub.traffic, hub.ended, instead=INSTEAD
            )


def _size(hub: Hub, url: str, name: str) -> int:
    """Redirects are followed, and never from https to http."""
    for _ in range(REDIRECTS):
        asked = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
        with answer(url, asked, hub.patience.silence) as found:
            hub.traffic.count(answers=1)
            total = found.headers.get("content-range", "").rpartition("/")[2]
            if found.status == 206 and total.isdecimal():
                return int(total)
            said = f"{host(found.url)} answers with status {found.status}"
            if found.status in TEMPORARY:
                raise Lost(said, asked_pause(found.headers))
            if found.status in (200, 206, 416):
                why = f"{said} to a request for one byte"
                raise CheckpointError("is not served by ranges of bytes", where=name, why=why, hint=INSTEAD)
            finish(found)
            if found.status not in MOVED:
                raise refused(name, found.status, found.headers.get("x-error-code", ""), said)
            target = urljoin(found.url, found.headers.get("location", ""))
            if origin(url)[0] == "https" and not target.startswith("https://"):
                raise CheckpointError(f"is sent to {quoted(target)}", where=name, hint=INSTEAD)
            url = target
    raise CheckpointError("is sent from one address to the next", where=name, hint=INSTEAD)
