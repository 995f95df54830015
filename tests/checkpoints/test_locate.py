"""What MODEL_PATH may be besides a model's folder: entries of the hub's cache, trainers' folders, pages."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hub_server
import pytest
import tiny

from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.checkpoints.hub_model import FILES, TEMPLATES, Repository, parse
from dsconvert.checkpoints.locate import find
from dsconvert.checkpoints.source_files import COMPANIONS
from dsconvert.checkpoints.weight_files import Shelf, choose
from dsconvert.errors import CheckpointError, ConversionError, UsageError

ROOT = Path(__file__).parents[2]
SMALL = tiny.Tiny(layers=1, d=16, ff=32, heads=2, kv_heads=1, vocab=48, tokenizer=False)
COMMITS = ["1" * 40, "2" * 40]


def refusal(path: Path | str, kind: type[ConversionError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(path)
    return str(caught.value)


def entry(root: Path, commits: list[str], main: str | None) -> Path:
    """An entry of the hub's cache as the client lays it out: links from snapshots to blobs."""
    model = tiny.tiny_checkpoint(root / "model", SMALL)
    entry = root / "models--owner--name"
    for folder in ("blobs", "refs", "snapshots"):
        (entry / folder).mkdir(parents=True)
    for path in model.iterdir():
        (entry / "blobs" / path.name).write_bytes(path.read_bytes())
        for commit in commits:
            (entry / "snapshots" / commit).mkdir(exist_ok=True)
            (entry / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{path.name}")
    if main is not None:
        (entry / "refs" / "main").write_text(main)
    return entry


def test_an_entry_of_the_hubs_cache_is_its_main_snapshot(tmp_path: Path) -> None:
    found = open_checkpoint(entry(tmp_path, COMMITS, COMMITS[0] + "\n"))
    assert found.folder.name == COMMITS[0]
    assert f"the snapshot {COMMITS[0]}" in found.notes[0]
    assert set(found.shapes()) == set(tiny.tiny_shapes(SMALL))


def test_an_entry_without_main_is_its_only_snapshot(tmp_path: Path) -> None:
    assert find(entry(tmp_path, COMMITS[1:], None)).path.name == COMMITS[1]


@pytest.mark.parametrize("main", [None, "3" * 40, "../.."])
def test_of_several_snapshots_without_main_one_has_to_be_named(tmp_path: Path, main: str | None) -> None:
    folder = entry(tmp_path, COMMITS, main)
    text = refusal(folder)
    assert "without a snapshot of the branch main" in text
    assert str(folder / "snapshots" / COMMITS[1]) in text


def test_the_whole_cache_names_its_entries(tmp_path: Path) -> None:
    entry(tmp_path / "hub", COMMITS, COMMITS[0])
    (tmp_path / "hub" / "model").rename(tmp_path / "model")
    assert "'models--owner--name'" in refusal(tmp_path / "hub")


def test_a_trainers_folder_names_its_checkpoints_by_number(tmp_path: Path) -> None:
    for number in (1000, 500, 90):
        tiny.tiny_checkpoint(tmp_path / f"checkpoint-{number}", SMALL)
    text = refusal(tmp_path)
    assert "3 of them: 'checkpoint-90', 'checkpoint-500', 'checkpoint-1000'" in text
    assert f"Give one of them, for example {tmp_path / 'checkpoint-1000'}" in text
    tiny.tiny_checkpoint(tmp_path, SMALL)  # the best one, saved at the root, is a model like any
    assert open_checkpoint(tmp_path).folder == tmp_path


def test_an_adapter_is_named_with_its_base(tmp_path: Path) -> None:
    tiny.write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "owner/base"})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    text = refusal(tmp_path)
    assert "is an adapter, not a model" in text
    assert "'owner/base'" in text
    assert "merge_and_unload()" in text


@pytest.mark.parametrize(
    ("text", "name", "revision"),
    [
        ("owner/name", "owner/name", None),
        ("owner/name@v1.0", "owner/name", "v1.0"),
        ("owner/name@refs/pr/1", "owner/name", "refs/pr/1"),
        ("https://huggingface.co/owner/name", "owner/name", None),
        ("https://huggingface.co/owner/name/", "owner/name", None),
        ("https://huggingface.co/owner/name?library=transformers#usage", "owner/name", None),
        ("http://hf.co/owner/name", "owner/name", None),
        ("huggingface.co/owner/name", "owner/name", None),
        ("https://huggingface.co/owner/name/tree/main", "owner/name", "main"),
        ("https://huggingface.co/owner/name/tree/refs%2Fpr%2F1", "owner/name", "refs/pr/1"),
        ("https://huggingface.co/owner/name/tree/refs/pr/1", "owner/name", "refs/pr/1"),
        ("https://huggingface.co/owner/name/blob/v2/config.json", "owner/name", "v2"),
        ("https://huggingface.co/owner/name/resolve/abc/model.safetensors", "owner/name", "abc"),
        ("https://huggingface.co/owner/name/discussions", "owner/name", None),
        ("hf://owner/name@dev", "owner/name", "dev"),
        ("https://mirror.example/owner/name/tree/main", "owner/name", "main"),
    ],
)
def test_what_a_hub_id_or_a_page_stands_for(
    monkeypatch: pytest.MonkeyPatch, text: str, name: str, revision: str | None
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert parse(text) == Repository(name, revision)


@pytest.mark.parametrize(
    "text", ["https://example.com/owner/name", "ftp://huggingface.co/a/b", "name", "./a/b", "a b/c", "a/b@"]
)
def test_what_is_no_hub_id_does_not_exist(text: str) -> None:
    assert parse(text) is None
    assert "does not exist" in refusal(text, UsageError)


@pytest.mark.parametrize(
    "path", ["datasets/owner/name", "spaces/owner/name", "owner", "", "owner/name/tree/main/inner/folder"]
)
def test_a_page_of_something_else_is_refused(path: str) -> None:
    text = refusal(f"https://huggingface.co/{path}", UsageError)
    assert "is not the page of a model" in text or "is a folder inside a repository" in text


# --- what is fetched -------------------------------------------------------------------------------------

OPEN = """
import sys
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.errors import ConversionError
from pathlib import Path
from dsconvert.checkpoints.locate import ModelPath
revision, cache = (sys.argv + [None, None])[2:4]
try:
    folder = open_checkpoint(ModelPath(sys.argv[1], revision, cache and Path(cache))).folder
    print(*sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
except ConversionError as error:
    print(error)
"""
NEEDED = (
    "config.json", "model.safetensors", "README.md", "LICENSE.md", "tokenizer.model", "merges.txt",
    "vocab.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
)  # fmt: skip
UNNEEDED = (
    "original/params.json",
    "original/w.safetensors",
    "pytorch_model.bin",
    "model.fp16.safetensors",
    "model-00001-of-00002.safetensors",
    "consolidated.safetensors",
    "optimizer.bin",
    "image.png",
)


def opened(hub: hub_server.Hub, home: Path, *model: str, **environment: Any) -> str:
    client = hub_server.client_environment(hub.url, home)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **client, **environment}
    command = [sys.executable, "-c", OPEN, *model]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.strip()


def test_a_hub_id_brings_what_outputs_are_made_of(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", SMALL)
    files = dict.fromkeys(NEEDED + UNNEEDED, b"x")
    files |= {path.name: path.read_bytes() for path in model.iterdir()}
    with hub_server.serving(hub_server.Hub({"owner/name": files})) as hub:
        for model_path in ("owner/name@v1", f"{hub.url}/owner/name/tree/v1"):
            assert opened(hub, tmp_path / "home", model_path).split() == sorted(NEEDED)
        asked = {path for _, path, _ in hub.asked if path.startswith("api/models/owner/name/revision/")}
        assert "api/models/owner/name/revision/v1" in asked


def test_of_shards_those_of_the_index_are_fetched_once(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", tiny.Tiny(**{**vars(SMALL), "shards": 2}))
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    wanted = sorted(files)
    files |= {"pytorch_model.bin": b"x", "model-00001-of-00003.safetensors": b"x"}
    cache, home = tmp_path / "cache", tmp_path / "home"
    with hub_server.serving(hub_server.Hub({"owner/name": files})) as hub:
        for _ in range(2):
            assert opened(hub, home, "owner/name", "main", str(cache)).split() == wanted
        gets = [path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path]
        assert len(gets) == len(set(gets)) == len(wanted)
        assert (cache / "models--owner--name").is_dir()
        assert not (home / "hub" / "models--owner--name").exists()
        asked = len(hub.asked)
        offline = opened(hub, home, "owner/name", "main", str(cache), HF_HUB_OFFLINE="1")
        assert offline.split() == wanted
        next(cache.rglob("snapshots/*/*-00002-of-00002.safetensors")).unlink()
        gone = opened(hub, home, "owner/name", "main", str(cache), HF_HUB_OFFLINE="1")
        assert "owner/name@main: is not in the local cache" in gone
        assert len(hub.asked) == asked


def test_an_index_without_its_weights_is_passed_over_on_the_hub(tmp_path: Path) -> None:
    tiny.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"x": "gone.safetensors"}})
    names = ["pytorch_model-00001-of-00001.bin", "pytorch_model-00001-of-00002.bin", "other.bin"]
    tiny.write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": {"x": names[0]}})
    choice = choose(Shelf(tmp_path, dict.fromkeys(names, lambda path: {})))
    assert choice.names == (names[0],)
    assert [path.name for path in choice.stale] == ["model.safetensors.index.json"]


def test_a_download_that_broke_off_is_made_whole(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", SMALL)
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    with hub_server.serving(hub_server.Hub({"owner/name": files})) as hub:
        hub.cut["model.safetensors"] = 5000
        assert "model.safetensors" in opened(hub, tmp_path / "home", "owner/name").split()
        asked = [
            path for method, path, _ in hub.asked if method == "GET" and path.endswith("model.safetensors")
        ]
    assert len(asked) == 2
    (kept,) = (tmp_path / "home").rglob("snapshots/*/model.safetensors")
    assert kept.read_bytes() == files["model.safetensors"]


def test_a_repository_without_weights_says_what_it_has(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model-q4_0.gguf": b"x"}
    with hub_server.serving(hub_server.Hub({"owner/name": files})) as hub:
        text = opened(hub, tmp_path / "home", "owner/name")
    assert "owner/name: holds no weights. Found only 'model-q4_0.gguf'" in text


def test_every_companion_of_an_output_is_fetched() -> None:
    for pattern in COMPANIONS:
        example = pattern.replace(".j*", ".jinja").replace("*", "_x")
        assert any(fnmatch.fnmatch(example, fetched) for fetched in FILES), pattern
    assert fnmatch.fnmatch("additional_chat_templates/x.jinja", TEMPLATES)
