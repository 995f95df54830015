"""A file on the hub read by ranges of bytes: every answer is checked, and a broken one is asked for again."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urljoin

from dsconvert.errors import CheckpointError, quoted
from dsconvert.network import (
    TEMPORARY,
    Answer,
    Lost,
    Patience,
    answer,
    asked_pause,
    finish,
    host,
    origin,
)

REDIRECTS = 5
MOVED = (301, 302, 303, 307, 308)
RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
DOWNLOAD = "Leave --remote out: the files are then downloaded, and a broken download goes on where it was"
AGAIN = "Run the same command again"


@dataclass
class Traffic:
    """What was read over the network: bytes of bodies, answers, and tries that had to be made again."""

    nbytes: int = 0
    answers: int = 0
    again: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, nbytes: int = 0, answers: int = 0, again: int = 0) -> None:
        """Add to the sums; many threads may call it."""
        with self.lock:
            self.nbytes += nbytes
            self.answers += answers
            self.again += again


@dataclass(eq=False)
class RemoteFile:
    """A file of a repository at one commit; `name` is what messages call it.

    `headers` hold the token and go to the origin of `url` alone. `size` and `oid` are what the hub's list of
    files says of it; every answer is held against them and against the first one. All threads may read. Of a
    file that is on no hub the commit is "".
    """

    name: str
    url: str
    commit: str
    size: int
    oid: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    patience: Patience = field(default_factory=Patience)
    traffic: Traffic = field(default_factory=Traffic, repr=False)
    ended: threading.Event = field(default_factory=threading.Event, repr=False)
    instead: str = DOWNLOAD  # what to do where ranges do not help
    _tags: dict[str, str] = field(default_factory=dict, repr=False)
    _place: str = field(default="", repr=False)  # where the hub has sent us; such an address runs out

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` - 1.

        What is lost on the way is asked for again from where it broke off, after a pause. Raises
        CheckpointError when that does not help, for a refusal, and for bytes that are not those asked for.
        """
        found, tries = bytearray(), 0
        while len(found) < stop - start:
            before = len(found)
            try:
                for piece in self._pieces(start + before, stop):
                    found += piece
            except Lost as lost:
                tries = 1 if len(found) > before and not lost.slow else tries + 1
                pause(self.name, tries, lost, self.patience, self.traffic, self.ended, self.instead)
        return bytes(found)

    def _pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes that one answer gives, which may be fewer than were asked for; raises Lost."""
        with self._answer(start, stop) as found:
            left, began, got = self._length(found, start, stop), time.monotonic(), 0
            for piece in found.pieces:
                if self.ended.is_set():
                    raise CheckpointError("is not read any more", where=self.name)
                self.traffic.count(len(piece))
                got += len(piece)
                if got > left:
                    raise self._wrong(found, f"It sends more than the {left:,} bytes asked for")
                yield piece
                seconds = time.monotonic() - began
                if got < left and seconds > self.patience.window and got < self.patience.slowest * seconds:
                    raise Lost(f"{host(found.url)} sends {got / seconds:,.0f} bytes a second", slow=True)
            if got < left:
                raise Lost(f"{host(found.url)} broke off after {got:,} of {left:,} bytes")

    @contextmanager
    def _answer(self, start: int, stop: int) -> Iterator[Answer]:
        """The answer that holds the bytes, redirects followed; raises Lost for one that says: later."""
        url = self._place or self.url
        for _ in range(REDIRECTS):
            ours = origin(url) == origin(self.url)
            asked = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            with answer(url, {**(self.headers if ours else {}), **asked}, self.patience.silence) as found:
                self.traffic.count(answers=1)
                if ours:
                    self._check_hub(found)
                if found.status in (200, 206):
                    yield found
                    return
                finish(found)
                if found.status not in MOVED:
                    raise self._refusal(found, ours)
                url = self._target(found)
        raise self._wrong(found, f"It sends from one address to the next, {REDIRECTS} times")

    def _target(self, found: Answer) -> str:
        """Where a redirect leads."""
        target = urljoin(found.url, found.headers.get("location", ""))
        schemes = ("https",) if found.url.startswith("https:") else ("https", "http")
        if not target.startswith(tuple(f"{scheme}://" for scheme in schemes)):
            raise self._wrong(found, f"It sends to {quoted(target)}, which is not {' or '.join(schemes)}")
        if origin(target) != origin(self.url):
            self._place = target
        return target

    def _check_hub(self, found: Answer) -> None:
        """The hub still speaks of the commit and the content that were opened."""
        commit = found.headers.get("x-repo-commit", self.commit)
        if self.commit and commit != self.commit:
            raise self._changed(f"It was opened at commit {self.commit}, the hub answers with {commit[:80]}")
        size = found.headers.get("x-linked-size", "")
        if size.isdecimal() and int(size) != self.size:
            raise self._changed(f"It had {self.size:,} bytes, now {int(size):,}")
        tag = _bare(found.headers.get("x-linked-etag", ""))
        if tag:
            self._hold("hub", tag, self.oid)

    def _hold(self, place: str, tag: str, expected: str = "") -> None:
        """The content's name at a place is what it was at the first answer from there."""
        first = self._tags.setdefault(place, expected or tag)
        if tag != first:
            raise self._changed(f"Its etag was {quoted(first)}, now {quoted(tag)}")

    def _length(self, found: Answer, start: int, stop: int) -> int:
        """How many bytes the answer has to bring; raises CheckpointError for others than were asked for."""
        headers = found.headers
        if headers.get("content-encoding", "identity") != "identity":
            raise self._wrong(found, f"It sends them packed, as {quoted(headers['content-encoding'])}")
        if tag := _bare(headers.get("etag", "")):
            self._hold(host(found.url), tag)
        if found.status == 200:
            if (start, stop) != (0, self.size):
                raise self._wrong(found, "It sends the whole file, status 200 in place of 206")
            return self.size
        text = headers.get("content-range", "")
        match = RANGE.fullmatch(text)
        if not match:
            raise self._wrong(found, f"Its Content-Range is {quoted(text)}")
        first, last = int(match[1]), int(match[2])
        if match[3] != "*" and int(match[3]) != self.size:
            raise self._changed(f"It had {self.size:,} bytes, now {int(match[3]):,}")
        if first != start or not start <= last < stop:
            raise self._wrong(found, f"Bytes {start}-{stop - 1} were asked for, it sends {first}-{last}")
        return last + 1 - first

    def _refusal(self, found: Answer, ours: bool) -> Exception:
        """What an answer without content means, as an error."""
        said = f"{host(found.url)} answers with status {found.status}"
        if found.status in TEMPORARY:
            return Lost(said, asked_pause(found.headers))
        if not ours and self._place and found.status in (400, 401, 403, 404, 410):
            self._place = ""  # a signed address holds for an hour: the hub gives a new one
            return Lost(said)
        if found.status == 416:
            return self._changed(f"{said}: it has fewer than the {self.size:,} bytes of before")
        return refused(self.name, found.status, found.headers.get("x-error-code", ""), said)

    def _changed(self, why: str) -> CheckpointError:
        return CheckpointError("has changed while it was read", where=self.name, why=why, hint=AGAIN)

    def _wrong(self, found: Answer, why: str) -> CheckpointError:
        what = f"{host(found.url)} does not serve the bytes that are asked for"
        return CheckpointError(what, where=self.name, why=why, hint=self.instead)


def pause(
    name: object,
    tries: int,
    lost: Lost,
    patience: Patience,
    traffic: Traffic,
    ended: threading.Event,
    instead: str = DOWNLOAD,
) -> None:
    """Wait before the next try; raises CheckpointError where there is to be none."""
    traffic.count(again=1)
    seconds = patience.pause_before(tries, lost.after)
    if tries >= patience.tries or seconds > patience.longest:
        asked = f"; it asks to wait {lost.after:,.0f} s" if lost.after else ""
        hint = f"{AGAIN} later. {instead}" if lost.after else f"Check the network. {AGAIN}. {instead}"
        what = "is read too slowly" if lost.slow else "cannot be read over the network"
        times = "once" if tries == 1 else f"{tries} times"
        raise CheckpointError(what, where=name, why=f"{lost}{asked}; tried {times}", hint=hint)
    if ended.wait(seconds):
        raise CheckpointError("is not read any more", where=name)


def refused(name: object, status: int, code: str, said: str) -> CheckpointError:
    """The hub's refusal in plain words; `code` is its X-Error-Code."""
    if code == "GatedRepo":
        what, hint = "is gated", "Accept its terms on its page, then run `hf auth login`"
    elif code == "RevisionNotFound":
        what, hint = "has no such revision", "Look at the branches and tags on its page"
    elif code == "EntryNotFound":
        what, hint = "is not in its repository", "Look at its file list; the revision may be another"
    elif code == "RepoNotFound" or status == 404:
        what = "is not on the hub, or is private"
        hint = "Check the spelling; for a private one run `hf auth login`"
    elif status in (401, 403):
        what, hint = "may not be read", "Run `hf auth login`, or set HF_TOKEN, with an account that may"
    else:
        what, hint = "cannot be read", f"{AGAIN} later"
    return CheckpointError(what, where=name, why=said, hint=hint)


def _bare(tag: str) -> str:
    """An etag without its quotes and without the mark of a weak one."""
    return tag.strip().removeprefix("W/").strip('"')
