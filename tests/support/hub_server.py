"""A local HTTP server that plays the Hugging Face hub, for the real client.

The client reads HF_ENDPOINT when it is imported, so it is run in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from hub_uploads import Uploads

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer to a GET of a file.

    `status` is answered in place of it, with `headers`; else the headers change those of the answer. `whole`
    ignores the range. Of the body `cut` bytes are sent before the connection is closed, or after `pause`
    seconds the rest; `rate` sends so many bytes a second; `body` is another file's content.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    whole: bool = False
    cut: int | None = None
    pause: float = 0.0
    rate: int = 0
    body: bytes | None = None


@dataclass
class Hub:
    """What the hub has, what goes wrong, and what it was asked.

    `files` maps "datasets/owner/name" or "owner/name" (a model) to its files. `cut` gives a path's first
    answer to GET only so many bytes; `longer` states so many bytes too many to HEAD; `status` answers every
    request for a path with this code, and the hub's own name of the error in `code`. `faults` are, for a
    file's name, what happens to its answers, one after the other; None lets one be. With `storage`, another
    server's address, safetensors files are redirected to it, as the hub does. With `token` nobody else is
    answered.
    """

    files: dict[str, dict[str, bytes]]
    commit: str = COMMIT
    cut: dict[str, int] = field(default_factory=dict)
    longer: dict[str, int] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)
    code: str = ""
    faults: dict[str, list[Fault | None]] = field(default_factory=dict)
    storage: str = ""
    token: str = ""
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    tokens: list[str] = field(default_factory=list)  # Authorization of each request
    peers: set[int] = field(default_factory=set)  # the client's ports: one a connection
    sent: int = 0  # bytes of bodies of GET
    delay: float = 0.0  # seconds before each answer
    rate: int = 0  # bytes a second of each body
    uploads: Uploads = field(default_factory=Uploads)
    url: str = ""

    def methods(self) -> list[str]:
        return [method for method, _, _ in self.asked]


def client_environment(url: str, home: Path) -> dict[str, str]:
    """The variables that point a fresh process's client at `url`, with its cache under `home`."""
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve on a free port of 127.0.0.1 while the block runs."""

    class Handler(_Handler):
        state = hub

    with _Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that hung up; its traceback would stand in the output of a command."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0].lstrip("/"), self.body()
        self.state.asked.append((self.command, path, ""))
        status, value = self.state.uploads.post(path, body, self.state.url, self.state.files)
        self.json(value, status)

    def do_PUT(self) -> None:
        self.state.uploads.put(self.path, self.body())
        self.json({})

    def body(self) -> bytes:
        """What was sent along, also in chunks."""
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def answer(self) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        time.sleep(self.state.delay)
        self.state.asked.append((self.command, path, self.headers.get("Range", "")))
        self.state.tokens.append(self.headers.get("Authorization", ""))
        self.state.peers.add(self.client_address[1])
        for name in self.state.status:
            if path.endswith(name):
                return self.refuse(self.state.status[name], self.state.code)
        if self.state.token and self.headers.get("Authorization") != f"Bearer {self.state.token}":
            return self.refuse(401, "RepoNotFound")
        if path.startswith("api/"):
            return self.api(path.removeprefix("api/").removeprefix("models/"))
        repository, _, rest = path.partition("/resolve/")
        name, files = rest.partition("/")[2], self.state.files.get(repository)
        if files is None or name not in files:
            return self.refuse(404, "RepoNotFound" if files is None else "EntryNotFound")
        if self.state.storage and name.endswith(".safetensors"):
            return self.elsewhere(path, files[name])
        return self.file(name, files[name])

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", self.state.commit)
        self.send_header("Content-Length", "0")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()

    def elsewhere(self, path: str, body: bytes) -> None:
        """What the hub answers for a big file: where it is, and what it should be."""
        name = path.rpartition("/")[2]
        fault = self.fault(name + ":hub")
        if fault is not None and fault.status:
            return self.refuse(fault.status, "", fault.headers)
        linked = {"X-Linked-Etag": f'"{sha256(body)}"', "X-Linked-Size": str(len(body))}
        location = {"Location": f"{self.state.storage}/{path}?signature=1"}
        return self.refuse(302, "", {**linked, **location, **(fault.headers if fault else {})})

    def fault(self, name: str) -> Fault | None:
        """What goes wrong with this answer."""
        left = self.state.faults.get(name)
        return left.pop(0) if left and self.command == "GET" else None

    def file(self, name: str, body: bytes) -> None:
        fault = self.fault(name) or Fault()
        if fault.status:
            return self.refuse(fault.status, "", fault.headers)
        body = body if fault.body is None else fault.body
        start, stop, ranged = 0, len(body), False
        if (wanted := self.headers.get("Range")) and not fault.whole:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop, ranged = int(first), min(int(last or len(body)) + 1, len(body)), True
        part = body[start:stop]
        extra = self.state.longer.get(name, 0) if self.command == "HEAD" else 0
        headers = {
            "ETag": f'"{sha256(body)}"',
            "X-Repo-Commit": self.state.commit,
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(part) + extra),
            **({"Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"} if ranged else {}),
            **fault.headers,
        }
        self.send_response(206 if ranged else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.send_part(part, self.state.cut.pop(name, fault.cut), fault)
        return None

    def send_part(self, part: bytes, cut: int | None, fault: Fault) -> None:
        """The body, or what a fault leaves of it."""
        rate = fault.rate or self.state.rate
        step = max(rate // 20, 1) if rate else len(part) or 1
        cut = len(part) if cut is None else cut
        try:
            for at in range(0, cut, step):
                self.state.sent += min(at + step, cut) - at
                self.wfile.write(part[at : min(at + step, cut)])
                time.sleep(min(step, cut - at) / rate if rate else 0)
            time.sleep(fault.pause)
        except OSError:  # the client has had enough
            self.close_connection = True
            return
        self.close_connection = cut < len(part)

    def api(self, path: str) -> None:
        """What `snapshot_download` asks: a revision's commit and the list of files; and who is logged in."""
        if path == "whoami-v2":
            return self.json(self.state.uploads.whoami())
        repository = path.partition("/revision/")[0].partition("/tree/")[0]
        files = self.state.files.get(repository)
        if files is None:
            return self.refuse(404, "RepoNotFound")
        listed = [
            {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for name, body in files.items()
        ]
        value: Any = listed
        if "/tree/" not in path:
            value = {"id": repository, "sha": self.state.commit, "siblings": self.siblings(files)}
        self.json(value)
        return None

    def json(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.state.sent += len(body)
            self.wfile.write(body)

    def siblings(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
        """The list of files, with sizes and digests where they are asked for, as the hub says them."""
        if "blobs=" not in self.path:
            return [{"rfilename": name} for name in files]
        listed = []
        for name, body in files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(body), "blobId": "0" * 40}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"sha256": sha256(body), "size": len(body), "pointerSize": 100}
            listed.append(entry)
        return listed


@lru_cache(64)
def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
