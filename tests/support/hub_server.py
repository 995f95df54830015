"""A local HTTP server that plays the Hugging Face hub, for the real client.

The client reads HF_ENDPOINT when it is imported, so it is run in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the hub has, what goes wrong, and what it was asked.

    `files` maps "datasets/owner/name" or "owner/name" (a model) to its files. `cut` gives a path's first
    answer to GET only so many bytes; `longer` states so many bytes too many to HEAD; `status` answers every
    request for a path with this code.
    """

    files: dict[str, dict[str, bytes]]
    commit: str = COMMIT
    cut: dict[str, int] = field(default_factory=dict)
    longer: dict[str, int] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
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

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        self.state.asked.append((self.command, path, self.headers.get("Range", "")))
        for name in self.state.status:
            if path.endswith(name):
                return self.refuse(self.state.status[name], "")
        if path.startswith("api/"):
            return self.api(path.removeprefix("api/").removeprefix("models/"))
        repository, _, rest = path.partition("/resolve/")
        if repository not in self.state.files:
            return self.refuse(404, "RepoNotFound")
        name = rest.partition("/")[2]
        if name not in self.state.files[repository]:
            return self.refuse(404, "EntryNotFound")
        return self.file(name, self.state.files[repository][name])

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", self.state.commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def file(self, name: str, body: bytes) -> None:
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        part = body[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.state.commit)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        extra = self.state.longer.get(name, 0) if self.command == "HEAD" else 0
        self.send_header("Content-Length", str(len(part) + extra))
        self.end_headers()
        if self.command == "GET":
            sent = self.state.cut.pop(name, None)
            self.wfile.write(part[:sent])
            self.close_connection = sent is not None

    def api(self, path: str) -> None:
        """What `snapshot_download` asks: a revision's commit and the list of files."""
        repository = path.partition("/revision/")[0].partition("/tree/")[0]
        files = self.state.files.get(repository)
        if files is None:
            return self.refuse(404, "RepoNotFound")
        listed = [
            {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for name, body in files.items()
        ]
        value: Any = listed
        if "/revision/" in path:
            siblings = [{"rfilename": name} for name in files]
            value = {"id": repository, "sha": self.state.commit, "siblings": siblings}
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        return None
