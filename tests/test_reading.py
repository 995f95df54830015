"""The reader of small files: what a stranger's folder may hold under any name, and that it stays bounded."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from converters.gguf import importance
from converters.gguf.parse import open_gguf
from dsconvert import reading
from dsconvert.checkpoints.checkpoint import open_weights
from dsconvert.errors import CheckpointError, ConversionError, OutputError, TokenizerError
from dsconvert.models.config import load_json
from dsconvert.proof.logprob_file import open_base
from dsconvert.quantization.run_state import State
from tokenizer_tools import chat_template, library


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a pipe": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe"))[1],
    "a socket": _socket,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config": ("config.json", load_json),
    "index": ("model.safetensors.index.json", lambda path: open_weights(path.parent)),
    "safetensors": ("model.safetensors", lambda path: open_weights(path.parent)),
    "torch": ("pytorch_model.bin", lambda path: open_weights(path.parent)),
    "tokenizer": ("tokenizer.json", library.read_text),
    "tokenizer_config": ("tokenizer_config.json", library.read_object),
    "template": ("chat_template.jinja", lambda path: chat_template.collect(path.parent)),
    "legacy template": ("chat_template.json", lambda path: chat_template.collect(path.parent)),
    "GGUF": ("model.gguf", open_gguf),
    "imatrix": ("imatrix.dat", importance.read),
    "kld-base": ("base.kld", open_base),
    "state": ("job.json", lambda path: State(path.parent).identity()),
    "block record": ("block-00000.json", lambda path: State(path.parent).records()),
}


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize(("name", "read"), READERS.values(), ids=READERS)
def test_what_is_no_regular_file_gives_the_ordinary_error(
    name: str, read: Callable[[Path], object], make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(ConversionError):
        read(tmp_path / name)


def test_a_file_is_no_longer_than_its_kind_may_be(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(reading.CONFIG + 1)
    with pytest.raises(CheckpointError, match="too big: over 8 MiB"):
        load_json(path)
    (tmp_path / "chat_template.jinja").write_text("x" * (reading.TEMPLATE + 1))
    with pytest.raises(TokenizerError, match="too big: over 1 MiB"):
        chat_template.collect(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}), "utf-8-sig")
    (tmp_path / "chat_template.jinja").write_text("Hi", "utf-8-sig")
    assert load_json(tmp_path / "config.json") == library.read_object(tmp_path / "config.json") == {"a": 1}
    assert chat_template.collect(tmp_path).default == "Hi"


UNSOUND = {
    "nested deeper than the parser goes": ('{"a":' * 100_000, "depth|deep"),
    "nested deeper than what walks it goes": ('{"a":' * 200 + "1" + "}" * 200, "nested more than 100 deep"),
    "a number of 5,000 digits": ('{"a": ' + "9" * 5000 + "}", "digits"),
    "half a pair in a value": (r'{"a": {"name": ["x", "\ud800"]}}', "the value of 'name' holds half"),
    "half a pair in a key": (r'{"a\udfff": 1}', r"the key 'a\\udfff' holds half"),
    "no JSON": ("{]", "line 1"),
    "a list": ("[1]", "holds list"),
    "empty": ("", "Expecting value"),
}


@pytest.mark.parametrize(("text", "said"), UNSOUND.values(), ids=UNSOUND)
def test_unsound_json_is_refused_where_it_is_read(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        load_json(tmp_path / "config.json")


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(r'{"a": "\ud83d\ude00", "b": "\\ud800"}')
    assert load_json(tmp_path / "config.json") == {"a": "\N{GRINNING FACE}", "b": r"\ud800"}


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match="Byte 7 is 0xff"):
        load_json(tmp_path / "config.json")


def test_whatever_a_parser_raises_is_the_ordinary_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise MemoryError("no room")

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(json, "loads", fail)
    with pytest.raises(CheckpointError, match="no room"):
        load_json(tmp_path / "config.json")


@pytest.mark.parametrize("damage", ["", "[", "[]", "null", '{"sha256": 3}', "{}"])
def test_a_damaged_record_of_a_run_is_named(damage: str, tmp_path: Path) -> None:
    (tmp_path / "block-00000.json").write_text(damage)
    with pytest.raises(OutputError, match=r"Remove block-00000\.json"):
        State(tmp_path).records()


def test_links_stay_in_the_folder_or_in_the_cache_around_it(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--o--n"
    model, blobs = cache / "snapshots" / "abc", cache / "blobs"
    model.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("")
    (tmp_path / "secret").write_text("")
    links = {"blob": "../../blobs/1", "own": "blob", "out": "../../../../secret", "circle": "circle"}
    for name, target in links.items():
        (model / name).symlink_to(target)
    (tmp_path / "elsewhere").symlink_to(model)
    for folder in (model, tmp_path / "elsewhere"):
        within = {name for name in links if reading.inside(folder / name, folder)}
        assert within == {"blob", "own"}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "LICENSE").symlink_to(tmp_path / "secret")
    (tmp_path / "plain" / "README.md").write_text("")
    assert not reading.inside(tmp_path / "plain" / "LICENSE", tmp_path / "plain")
    assert reading.inside(tmp_path / "plain" / "README.md", tmp_path / "plain")
