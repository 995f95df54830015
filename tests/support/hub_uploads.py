"""The hub's answers to an upload, as `create_repo` and `create_commit` of the real client ask for them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

BIG = (".gguf", ".safetensors")


@dataclass
class Uploads:
    """Who is logged in, and what was uploaded: blobs by sha256, commits as message and names of files.

    `status` answers what is posted to a path that ends so with this code.
    """

    user: str = "owner"
    orgs: tuple[str, ...] = ("lab",)
    role: str = "write"
    blobs: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)
    private: dict[str, bool] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)

    def whoami(self) -> dict[str, Any]:
        orgs = [{"name": name} for name in self.orgs]
        return {"name": self.user, "orgs": orgs, "auth": {"accessToken": {"role": self.role}}}

    def put(self, path: str, body: bytes) -> None:
        digest = path.rpartition("/")[2]
        assert digest == hashlib.sha256(body).hexdigest()
        self.blobs[digest] = body

    def post(self, path: str, body: bytes, url: str, files: dict[str, dict[str, bytes]]) -> tuple[int, Any]:
        """Status and JSON value; `files` of repositories are changed by commits."""
        for end, status in self.status.items():
            if path.endswith(end):
                return status, {"error": "no"}
        answers: dict[str, Callable[[], tuple[int, Any]]] = {
            "api/validate-yaml": lambda: (200, {"errors": [], "warnings": []}),
            "api/repos/create": lambda: self.create(json.loads(body), url, files),
        }
        if path in answers:
            return answers[path]()
        if "/preupload/" in path:
            return 200, {"files": [_mode(file) for file in json.loads(body)["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"objects": [_action(o, url) for o in json.loads(body)["objects"]]}
        assert "/commit/" in path, path
        repository = path.removeprefix("api/models/").partition("/commit/")[0]
        lines = [json.loads(line) for line in body.splitlines()]
        return self.commit(lines, f"{url}/{repository}", files[repository])

    def create(self, asked: dict[str, Any], url: str, files: dict[str, dict[str, bytes]]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in files:
            return 409, {"error": "exists", "url": f"{url}/{name}"}
        files[name] = {}
        self.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        return 200, {"url": f"{url}/{name}"}

    def commit(self, lines: list[dict[str, Any]], url: str, held: dict[str, bytes]) -> tuple[int, Any]:
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        named = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                held[value["path"]] = self.blobs[value["oid"]]
            named += [value["path"]] if "path" in value else []
        self.commits.append((message, named))
        return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{url}/commit/1"}


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(BIG) else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def _action(wanted: dict[str, Any], url: str) -> dict[str, Any]:
    href = f"{url}/upload/{wanted['oid']}"
    return {"oid": wanted["oid"], "size": wanted["size"], "actions": {"upload": {"href": href}}}
