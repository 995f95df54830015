"""`dsconvert inspect` of GGUF files on the hub and at URLs: as of the file on disk, by its header alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hub_server import Fault, Hub, serving
from huggingface_hub import constants

from converters.gguf import remote
from converters.gguf.layout import MAGIC
from dsconvert.checkpoints import hub_listing
from dsconvert.cli import cli
from dsconvert.network import Patience

NAME = "owner/name"
FILE = "sample-q4_0.gguf"


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, list(map(str, words)))


def told(name: str | Path) -> list[dict[str, Any]]:
    done = command("inspect", name, "--json")
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, and a set of three, in a folder of its own."""
    folder = tmp_path_factory.mktemp("files")
    common = ("gguf", "sample:", "-q", "q4_0", "--effort", "off")
    for words in (("-o", folder / FILE), ("-o", folder / "sub" / "s.gguf", "--split-max-size", "600K")):
        (folder / "sub").mkdir(exist_ok=True)
        done = command(*common, *words)
        assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def hub(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, where nothing is of that name on disk; a header comes in several pieces."""
    found = {str(p.relative_to(files)): p.read_bytes() for p in files.rglob("*.gguf")}
    monkeypatch.setattr(hub_listing, "Patience", partial(Patience, pause=0.01, tries=3))
    monkeypatch.setattr(remote, "HEAD", 4096)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.chdir(tmp_path)
    with serving(Hub({NAME: found, "owner/one": {FILE: found[FILE]}, "owner/none": {"a.txt": b""}})) as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


FORMS = {
    "a file": f"{NAME}/{FILE}",
    "a file of a revision": f"{NAME}@main/{FILE}",
    "the only file": "owner/one",
    "a page": f"https://huggingface.co/{NAME}/blob/main/{FILE}",
    "a link": f"hf://{NAME}@main/{FILE}",
    "an address without https": f"hf.co/{NAME}/resolve/main/{FILE}",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_on_the_hub_is_shown_as_on_this_disk(files: Path, hub: Hub, form: str) -> None:
    (expected,) = told(files / FILE)
    found, fetched = told(FORMS[form])
    assert {**found, "files": None} == {**expected, "files": None}
    assert found["files"][0].endswith(f"/{FILE}")
    assert fetched["nbytes"] == hub.sent
    assert fetched["answers"] == sum("owner/" in path for _, path, _ in hub.asked)
    ranges = [span.removeprefix("bytes=").split("-") for _, path, span in hub.asked if path.endswith(FILE)]
    assert len(ranges) > 2
    header = found["bytes"] - sum(tensor["bytes"] for tensor in found["tensors"])
    assert header < int(ranges[-1][1]) < 2 * header


def test_a_url_of_another_server_gets_no_token(
    files: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    (expected,) = told(files / FILE)
    found, fetched = told(f"{hub.url}/{NAME}/resolve/main/{FILE}")
    assert {**found, "files": None} == {**expected, "files": None}
    assert found["files"] == [f"{hub.url.removeprefix('http://')}/{NAME}/resolve/main/{FILE}"]
    assert set(hub.tokens) == {""}
    assert fetched["again"] == 0


@pytest.mark.parametrize(
    "address", [NAME + "/sub/s-00001-of-{}.gguf", "{url}/owner/name/resolve/main/sub/s-00001-of-{}.gguf"]
)
def test_every_header_of_a_set_is_read(files: Path, hub: Hub, address: str) -> None:
    parts = sorted((files / "sub").iterdir())
    assert len(parts) > 1
    (expected,) = told(parts[0])
    found, _ = told(address.format(f"{len(parts):05d}", url=hub.url))
    assert {**found, "files": None} == {**expected, "files": None}
    assert [Path(name).name for name in found["files"]] == [path.name for path in parts]


def test_what_breaks_off_is_asked_for_again(files: Path, hub: Hub) -> None:
    hub.faults[FILE] = [Fault(cut=100), Fault(status=503), None]
    found, fetched = told(f"{NAME}/{FILE}")
    assert found["tensors"] == told(files / FILE)[0]["tensors"]
    assert fetched["again"] == 2


REFUSED = {
    "several files": (NAME, "holds 2 GGUF files. sample-q4_0.gguf, sub/s-00001-of-"),
    "no GGUF file": ("owner/none", "holds no GGUF file. It holds 1 files of other kinds"),
    "no such file": (f"{NAME}/x.gguf", "holds no file 'x.gguf'. It has "),
    "no such repository": ("owner/other", "is not on the hub, or is private"),
    "no page of a file": ("{url}/owner/none/x.gguf", "is no file of a model"),
    "no model file at the hub": ("https://huggingface.co/docs/x.gguf", "is no file of a model"),
    "nothing of this name": ("here.gguf", "cannot be opened as a GGUF file"),
    "no file in a folder that is here": ("here/x/y.gguf", "cannot be opened as a GGUF file"),
    "another kind of file": ("owner/none/a.txt", "is not a GGUF file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_file_there_is_refused_by_name(hub: Hub, tmp_path: Path, name: str) -> None:
    (tmp_path / "here").mkdir()
    address, words = REFUSED[name]
    done = command("inspect", address.format(url=hub.url))
    assert done.exit_code == 2, done.output
    assert words in done.stderr


def test_a_server_without_ranges_is_named(hub: Hub) -> None:
    hub.faults[FILE] = [Fault(whole=True, headers={"Content-Range": ""})] * 3
    done = command("inspect", f"{hub.url}/{NAME}/resolve/main/{FILE}")
    assert done.exit_code == 2
    assert "is not served by ranges of bytes" in done.stderr or "status 200" in done.stderr
    assert "Download the file" in done.stderr


def test_a_header_that_says_it_is_longer_than_any_is_not_fetched(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lengths in a stranger's file do not say how much is read."""
    from converters.gguf import parse

    monkeypatch.setattr(parse, "LARGEST", 1 << 14)
    head = MAGIC + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")
    key = (1).to_bytes(8, "little") + b"k" + (8).to_bytes(4, "little") + (1 << 19).to_bytes(8, "little")
    hub.files[NAME]["long.gguf"] = head + key + bytes(1 << 20)
    done = command("inspect", f"{NAME}/long.gguf")
    assert done.exit_code == 2
    assert "a string of 524288 bytes does not fit" in done.stderr
    assert hub.sent < 1 << 15


def test_offline_means_no_question(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = command("inspect", f"{NAME}/{FILE}")
    assert done.exit_code == 2
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert hub.asked == []
