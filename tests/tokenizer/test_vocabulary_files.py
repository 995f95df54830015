"""vocab.json and merges.txt without tokenizer.json: GPT-2's class is built, of others the way is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from added_tokens import change, convert, entry, sample
from click.testing import CliRunner
from tiny_tokenizer import BOS, tokenizer_json, write

from dsconvert.cli import cli
from dsconvert.errors import TokenizerError
from tokenizer_tools import raw, show
from tokenizer_tools.load import load_tokenizer
from tokenizer_tools.samples import PROBES

TEXTS = (*PROBES, f"{BOS}Hello </s> world", "  a  <|im_start|>user")


def taken_apart(folder: Path, kind: str = "GPT2Tokenizer") -> None:
    """tokenizer.json as a slow tokenizer leaves it: vocab.json, merges.txt, added_tokens.json."""
    path = folder / "tokenizer.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    path.unlink()
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in found["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(found["model"]["vocab"]), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), "utf-8")
    change(folder / "added_tokens.json", **{token["content"]: token["id"] for token in found["added_tokens"]})
    change(folder / "tokenizer_config.json", tokenizer_class=kind)


@pytest.mark.parametrize("prefix_space", [None, False, True])
@pytest.mark.parametrize("decoder", [False, True])
def test_ids_are_those_of_transformers(decoder: bool, prefix_space: bool | None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write(tmp_path, tokenizer_json(), {"bos_token": BOS, "eos_token": "</s>"})
    config: dict[str, Any] = {"model_type": "gpt2"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    taken_apart(folder)
    if decoder:
        listed = json.loads((folder / "added_tokens.json").read_text("utf-8"))
        (folder / "added_tokens.json").unlink()
        entries = {str(i): entry(content) for content, i in listed.items()}
        change(folder / "tokenizer_config.json", added_tokens_decoder=entries)
    if prefix_space is not None:
        change(folder / "tokenizer_config.json", add_prefix_space=prefix_space)
    theirs = AutoTokenizer.from_pretrained(folder)
    data = load_tokenizer(folder, 3000)
    assert data.encode(TEXTS) == [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
    assert data.source == folder / "tokenizer.json"
    assert not (folder / "tokenizer.json").exists()


def test_the_sample_taken_apart_converts(tmp_path: Path) -> None:
    result = convert(sample(tmp_path / "model", taken_apart), tmp_path / "x.gguf")
    assert result.exit_code == 0, result.output
    assert "pre-tokenizer gpt-2" in result.output


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", None])
def test_another_class_is_told_the_command_that_makes_it(kind: Any, tmp_path: Path) -> None:
    folder = sample(tmp_path / "model", lambda path: taken_apart(path, kind))
    with pytest.raises(TokenizerError, match=r"there is no tokenizer\.json") as caught:
        load_tokenizer(folder, 2048)
    assert 'python -c "from transformers import AutoTokenizer as A; A.from_pretrained(' in str(caught.value)


def test_the_command_makes_it(tmp_path: Path) -> None:
    folder = sample(tmp_path / "model", lambda path: taken_apart(path, "Qwen2Tokenizer"))
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(folder, 2048)
    code = str(caught.value).partition('python -c "')[2].partition('"')[0]
    before = (folder / "tokenizer_config.json").read_bytes()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
    assert (folder / "tokenizer_config.json").read_bytes() == before
    assert load_tokenizer(folder, 2048).special["bos"] == 2000


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_one_of_the_files_is_not_enough(name: str, tmp_path: Path) -> None:
    folder = sample(tmp_path / "model", taken_apart)
    (folder / name).unlink()
    with pytest.raises(TokenizerError, match=r"there is no tokenizer\.json"):
        load_tokenizer(folder, 2048)


@pytest.mark.parametrize(
    ("file", "text"), [("vocab.json", "[]"), ("vocab.json", '{"a": "x"}'), ("merges.txt", "a")]
)
def test_damaged_files_are_refused(file: str, text: str, tmp_path: Path) -> None:
    folder = sample(tmp_path / "model", taken_apart)
    (folder / file).write_text(text)
    with pytest.raises(TokenizerError):
        load_tokenizer(folder, 2048)


def test_the_command_tokenizer_sees_every_file(tmp_path: Path) -> None:
    folder = sample(tmp_path / "model", taken_apart)
    change(folder / "tokenizer_config.json", added_tokens_decoder=None)
    change(folder / "added_tokens.json", **{"<|im_start|>": 2015})
    result = CliRunner().invoke(cli, ["tokenizer", str(folder), "--encode", "<|im_start|>user", "--json"])
    assert result.exit_code == 0, result.output
    assert "2015" in result.output
    assert show.open_folder(folder).spec is not None


def test_a_big_tokenizer_is_proven_too(tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer_json())
    text = (folder / "tokenizer.json").read_text("utf-8")
    (folder / "tokenizer.json").write_text(text + " " * (9 << 20), "utf-8")
    assert raw.added_ids(folder, 3000)[BOS] == len(tokenizer_json()["model"]["vocab"])
