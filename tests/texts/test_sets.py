"""Named texts through the real hub client against a local server; local files; what is wrong with them."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, Hub, client_environment, serving
from text_files import documents, finished, gzipped, parquet

from dsconvert.errors import CheckpointError, ConversionError, MissingLibrary, UsageError
from dsconvert.texts import files as text_files
from dsconvert.texts.conversations import read_chats
from dsconvert.texts.files import Texts, pack, read_documents
from dsconvert.texts.sets import SETS, Split, TextSet, load_text

C4, WIKITEXT = SETS
TRAIN, VALIDATION = C4.files["calibration"], C4.files["evaluation"]
RUN = """
import json, sys
from dsconvert.errors import ConversionError
from dsconvert.texts.sets import load_text
name, split, options = json.loads(sys.argv[1])
loading, events = load_text(name, split, **options), []
try:
    while True:
        events.append(next(loading).as_dict())
except StopIteration as done:
    text = done.value
    out = {"name": text.name, "notes": text.notes, "provenance": text.provenance,
           "documents": [text.documents[i] for i in range(min(len(text.documents), 3))]}
except ConversionError as error:
    out = {"error": str(error), "kind": type(error).__name__}
print(json.dumps({**out, "events": events}))
"""


@dataclass
class Client:
    """Loads texts in fresh processes, with one cache."""

    hub: Hub
    home: Path

    def load(self, name: str, split: Split = "calibration", url: str = "", **options: Any) -> dict[str, Any]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= client_environment(url or self.hub.url, self.home)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", RUN, json.dumps([name, split, options])],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def steps(self, result: dict[str, Any], kind: str = "step") -> str:
        return "\n".join(event["text"] for event in result["events"] if event["event"] == kind)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    files = {TRAIN: gzipped(["one", "two"]), VALIDATION: gzipped(["three"])}
    with serving(Hub({"datasets/" + C4.repository: files})) as hub:
        yield Client(hub, tmp_path / "home")


NOWHERE = "http://127.0.0.1:1"


def test_c4_is_fetched_once_and_then_asked_for(client: Client) -> None:
    first = client.load("c4")
    assert (first["name"], first["documents"], first["notes"]) == ("c4", ["one", "two"], [])
    assert first["provenance"]["revision"] == COMMIT
    assert first["provenance"]["files"][0]["bytes"] == len(gzipped(["one", "two"]))
    assert client.hub.methods().count("GET") == 1
    assert {path for _, path, _ in client.hub.asked} == {f"datasets/allenai/c4/resolve/main/{TRAIN}"}
    client.hub.asked.clear()
    again = client.load("c4")
    assert again["provenance"] == first["provenance"]
    assert client.hub.methods() == ["HEAD"]
    client.hub.asked.clear()
    offline = client.load("c4", offline=True)
    assert (offline["documents"], offline["provenance"]) == (first["documents"], first["provenance"])
    assert client.hub.asked == []


def test_evaluation_takes_the_validation_file(client: Client) -> None:
    assert client.load("c4", "evaluation")["documents"] == ["three"]


def test_a_new_version_is_fetched(client: Client) -> None:
    client.load("c4")
    client.hub.commit = "f" * 40
    client.hub.files["datasets/" + C4.repository][TRAIN] = gzipped(["newer"])
    got = client.load("c4")
    assert (got["documents"], got["provenance"]["revision"]) == (["newer"], "f" * 40)


def test_wikitext2_is_read_from_parquet(client: Client, tmp_path: Path) -> None:
    rows = ["", " = Title = \n", " Some text . \n"]
    path = parquet(tmp_path / "a.parquet", {"text": rows})
    client.hub.files["datasets/" + WIKITEXT.repository] = {WIKITEXT.files["calibration"]: path.read_bytes()}
    assert client.load("wikitext2")["documents"] == rows


def test_without_a_network_the_builtin_text_is_used_and_said(client: Client) -> None:
    got = client.load("c4", url=NOWHERE)
    assert (got["name"], got["provenance"]["source"]) == ("builtin", "builtin")
    said = client.steps(got, "warn")
    assert "c4 was asked for; the built-in text is used" in said
    assert "cannot be reached" in said
    assert got["notes"] == [said]
    assert "trying once more" in client.steps(got)
    strict = client.load("c4", url=NOWHERE, fallback=False)
    assert strict["kind"] == "Unreachable"


def test_without_a_network_the_cached_copy_is_used_and_said(client: Client) -> None:
    client.load("c4")
    got = client.load("c4", url=NOWHERE)
    assert (got["name"], got["documents"]) == ("c4", ["one", "two"])
    assert "the cached copy is used" in client.steps(got, "warn")


def test_offline_asks_nobody(client: Client) -> None:
    got = client.load("c4", offline=True)
    assert client.hub.asked == []
    assert got["name"] == "builtin"
    assert "is not in the local cache. --offline is given" in client.steps(got, "warn")
    assert client.load("c4", offline=True, fallback=False)["kind"] == "Unreachable"


def test_a_missing_file_and_a_missing_repository_are_errors(client: Client) -> None:
    client.hub.files["datasets/" + C4.repository] = {}
    assert f"allenai/c4/{TRAIN}: is not in its repository" in client.load("c4")["error"]
    client.hub.files.clear()
    assert "is in no repository that the hub shows" in client.load("c4")["error"]
    client.hub.status[TRAIN] = 403
    assert "may not be read" in client.load("c4")["error"]


def test_a_broken_hub_is_an_error_and_no_missing_network(client: Client) -> None:
    client.hub.status[TRAIN] = 503
    got = client.load("c4")
    assert "503" in got["error"]
    assert "try again later" in got["error"]


def test_a_cut_download_goes_on_where_it_stopped(client: Client) -> None:
    rng = random.Random(0)
    text = "".join(chr(97 + byte % 26) for byte in rng.randbytes(11 << 20))
    body = gzipped([text], level=0)
    client.hub.files["datasets/" + C4.repository][TRAIN] = body
    client.hub.cut[TRAIN] = len(body) - 1000  # the client writes 10 MB at a time
    got = client.load("c4")
    assert got["documents"] == [text]
    ranges = [asked for method, _, asked in client.hub.asked if method == "GET"]
    assert len(ranges) == 2
    assert ranges[1].startswith("bytes=")
    assert int(ranges[1][6:-1]) >= 10 << 20


def test_a_download_of_the_wrong_size_is_an_error_and_leaves_nothing(client: Client) -> None:
    client.hub.longer[TRAIN] = 100
    assert "cannot be downloaded" in client.load("c4")["error"]
    assert client.load("c4", offline=True)["name"] == "builtin"


def test_a_damaged_file_is_an_error(client: Client) -> None:
    client.hub.files["datasets/" + C4.repository][TRAIN] = gzipped(["one", "two"])[:-9]
    assert "is damaged or cut short" in client.load("c4")["error"]


# Local files: no client, no network.


def local(path: Path, split: Split = "calibration") -> TextSet:
    return finished(load_text(str(path), split, offline=True))


def test_a_mirror_folder_is_the_named_set(tmp_path: Path) -> None:
    for name, texts in ((TRAIN, ["one", "two"]), (VALIDATION, ["three"])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzipped(texts))
    for split, texts in (("calibration", ["one", "two"]), ("evaluation", ["three"])):
        text = local(tmp_path, split)  # type: ignore[arg-type]
        assert (text.name, text.method, documents(text)) == ("c4", "documents", texts)
    assert local(tmp_path / TRAIN).method == "documents"
    (tmp_path / VALIDATION).unlink()
    with pytest.raises(CheckpointError, match="a mirror of c4 without its file for evaluation"):
        local(tmp_path, "evaluation")


def test_a_mirror_of_wikitext2(tmp_path: Path) -> None:
    parquet(tmp_path / WIKITEXT.files["evaluation"], {"text": ["a", "", "b"]})
    text = local(tmp_path, "evaluation")
    assert (text.name, text.method, documents(text)) == ("wikitext2", "stream", ["a", "", "b"])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "Grüße\n你好".encode(), ["Grüße\n你好"]),
        ("a.txt", b"\xef\xbb\xbfmarked", ["marked"]),
        ("corpus", b"no suffix", ["no suffix"]),
        ("a.txt.gz", gzip.compress(b"zipped", mtime=0), ["zipped"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"content": "b", "id": 1}\n"c"', ["a", "b", "c"]),
        ("a.JSONL", b'\xef\xbb\xbf{"text": "a"}\r\n{"text": ""}\r\n', ["a", ""]),
        ("a.json", b'[{"text": "a"},\n "b"]', ["a", "b"]),
        ("a.json", b'["a", "b"]', ["a", "b"]),
        ("a.json.gz", gzipped(["a", "b\u2028c"]), ["a", "b\u2028c"]),
    ],
)
def test_local_files(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    text = local(tmp_path / name)
    assert (text.name, text.method, documents(text)) == (name, "packed", expected)
    assert text.provenance["files"][0]["name"] == name


def test_local_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"id": [1, 2], "content": ["a", "b"]})
    assert documents(local(path)) == ["a", "b"]
    with pytest.raises(CheckpointError, match=r"the table has no text. it holds id, words"):
        local(parquet(tmp_path / "b.parquet", {"id": [1], "words": ["a"]}))
    with pytest.raises(CheckpointError, match=r"row 2 has no text. it holds text"):
        local(parquet(tmp_path / "c.parquet", {"text": [None, 5]}))
    for damaged in (path.read_bytes()[:-20], b"PAR1 not", b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged or no parquet file"):
            local(path)


def test_parquet_without_pyarrow_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for name in ("wikitext2", str(tmp_path / "a.parquet")):
        with pytest.raises(MissingLibrary, match="pip install pyarrow"):
            finished(load_text(name, "calibration", offline=True))


def test_a_folder_gives_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in {
        "b.txt": "2",
        "a.md": "1",
        "sub/c.jsonl": '{"text": "3"}',
        ".git/d.txt": "no",
        "e.png": "\0",
    }.items():
        (tmp_path / name).write_text(content)
    text = local(tmp_path)
    assert documents(text) == ["1", "2", "3"]
    assert [file["name"] for file in text.provenance["files"]] == ["a.md", "b.txt", "sub/c.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no text files"):
        local(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text. it is empty"),
        ("a.txt", b" \n\t\n", "holds no text. it is empty"),
        ("a.jsonl", b"\n", "holds no text. it is empty"),
        ("a.json", b"[]", "holds no text. it is empty"),
        ("a.txt", b"text\0more", "is not text: byte 4 is NUL"),
        ("a.txt", "h\xe9".encode("latin-1"), "is not UTF-8: byte 1 is 0xe9.*iconv -f LATIN1"),
        ("a.txt", "text".encode("utf-16"), "is UTF-16, not UTF-8.*iconv"),
        ("a.txt", "text".encode("utf-16-le"), "byte 1 is NUL"),
        ("a.gz.txt", gzip.compress(b"named wrongly", mtime=0)[:4] + b"\0" * 9, "NUL|UTF-8"),
        ("a.txt.gz", b"no gzip", "is damaged or cut short"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-5], "is damaged or cut short"),
        ("a.json.gz", gzipped(["a" * 99])[:20], "is damaged or cut short"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "is not UTF-8: byte 10 in line 2 is 0xff"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 holds half a surrogate pair"),
        ("a.jsonl", b'{"text": 5}', "line 1 has no text. it holds text"),
        ("a.jsonl", b'{"body": "a", "id": 1}', "line 1 has no text. it holds body, id.*text or content"),
        ("a.jsonl", b"7", "line 1 has no text. it holds int"),
        ("a.jsonl", b'{"messages": []}', "--calib-chat"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.json", b'[1,\n"a"]', "row 1 has no text"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConversionError, match=message) as caught:
        local(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)


@pytest.mark.parametrize("name", ["c5", "no/such/file.txt", "a\0b", "x" * 5000])
def test_an_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(UsageError, match=r"neither a known text nor a file.*c4, wikitext2, builtin"):
        finished(load_text(name, "calibration"))


def test_the_builtin_parts_share_no_document() -> None:
    parts = [finished(load_text("builtin", split)) for split in ("calibration", "evaluation")]
    assert not set(documents(parts[0])) & set(documents(parts[1]))
    assert all(set(part.kinds) >= {"topics", "stdlib"} for part in parts)
    assert parts[0].provenance["sha256"] != parts[1].provenance["sha256"]


def test_packed_texts() -> None:
    texts = ["", "a", "é你🎉", "", "b"]
    packed: Texts = pack(texts)
    assert [packed[i] for i in range(len(packed))] == texts
    assert [packed.nbytes(i) for i in range(len(packed))] == [len(text.encode()) for text in texts]
    with pytest.raises(IndexError):
        packed[5]


def test_chats_in_the_usual_spellings(tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    hello = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    for rows in ([{"messages": hello}, hello, {"conversations": sharegpt}], [hello], [sharegpt, hello]):
        file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
        assert list(read_chats(file)) == [hello] * len(rows)
        file.write_text(json.dumps([{"messages": hello}] * 2, indent=1), "utf-8")
        assert list(read_chats(file)) == [hello] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "line 1 holds no messages"),
        ({"messages": []}, "line 1 holds no messages"),
        ({"messages": [{"role": "user"}]}, "line 1 holds a message without a role and a text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
    ],
)
def test_unusable_chats_are_named(tmp_path: Path, row: object, message: str) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(CheckpointError, match=message):
        list(read_chats(file))


def test_every_suffix_is_read(tmp_path: Path) -> None:
    for suffix in text_files.SUFFIXES:
        path = tmp_path / f"a{suffix}"
        plain = b'{"text": "a"}' if ".json" in suffix or ".nd" in suffix else b"a"
        if suffix == ".parquet":
            parquet(path, {"text": ["a"]})
        else:
            path.write_bytes(gzip.compress(plain) if suffix.endswith(".gz") else plain)
        assert text_files.is_text(path)
        assert list(read_documents(path)) == ["a"]
