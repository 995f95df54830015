"""BOS that a tokenizer's files lost: the warning, and the option that decides in every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from added_tokens import convert, sample
from click.testing import CliRunner
from tiny_tokenizer import BOS, EOS, rows, tokenizer_json, write

from converters.gguf.parse import open_gguf
from dsconvert.cli import cli
from dsconvert.errors import TokenizerError
from tokenizer_tools.load import load_tokenizer

NAMES = {"bos_token": BOS, "eos_token": EOS}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def saved_by_5(folder: Path) -> None:
    """The sample's tokenizer as transformers 5 saves it: without add_bos_token and its companions."""
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "chat_template.jinja").write_text(config.pop("chat_template"), "utf-8")
    for key in ("add_bos_token", "add_eos_token", "added_tokens_decoder"):
        config.pop(key)
    config |= {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend", "is_local": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "special_tokens_map.json").unlink()


WARNED: list[tuple[dict[str, Any], bool]] = [
    ({**NAMES, "backend": "tokenizers"}, True),
    ({**NAMES, "tokenizer_class": "TokenizersBackend"}, True),
    ({**NAMES, "chat_template": TEMPLATE}, True),
    ({**NAMES, "chat_template": "{{- bos_token -}}{{ messages }}"}, True),
    ({**NAMES, "chat_template": TEMPLATE, "add_bos_token": False}, False),
    ({**NAMES, "chat_template": TEMPLATE, "add_bos_token": True}, False),
    ({**NAMES, "chat_template": "{{ '<s>' }}{{ messages }}"}, False),
    ({**NAMES, "tokenizer_class": "LlamaTokenizerFast", "chat_template": TEMPLATE}, False),
    ({"eos_token": EOS, "backend": "tokenizers"}, False),
    (NAMES, False),
]


@pytest.mark.parametrize(("config", "warned"), WARNED)
def test_a_bos_that_may_be_lost_is_told(config: dict[str, Any], warned: bool, tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer_json(), config)
    notes = [note for note in load_tokenizer(folder, 3000).notes if "--add-bos" in note]
    assert len(notes) == warned
    if "bos_token" in config:  # who decides is not told
        for add_bos in (True, False):
            data = load_tokenizer(folder, 3000, add_bos)
            assert data.add_bos is add_bos
            assert data.first_id == (data.bos_id if add_bos else None)
            assert not any("--add-bos" in note for note in data.notes)


def test_a_post_processor_is_overruled_and_a_missing_bos_refused(tmp_path: Path) -> None:
    raw = tokenizer_json()
    n = rows(raw) - 3
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [n], "tokens": [BOS]}},
    }
    folder = write(tmp_path, raw, NAMES)
    assert load_tokenizer(folder, 3000).add_bos is True
    data = load_tokenizer(folder, 3000, False)
    assert data.add_bos is False
    assert not any("false wins" in note for note in data.notes)
    with pytest.raises(TokenizerError, match="--add-bos asks for a BOS that the tokenizer does not have"):
        load_tokenizer(write(tmp_path / "none", tokenizer_json(), {"eos_token": EOS}), 3000, True)


def test_gguf_says_it_and_does_as_told(llama: Any, tmp_path: Path) -> None:
    folder = sample(tmp_path / "model", saved_by_5)
    cases = ((["--add-bos"], True, False), (["--no-add-bos"], False, False), ([], False, True))
    for options, added, warned in cases:
        result = convert(folder, tmp_path / "x.gguf", "--force", *options)
        assert result.exit_code == 0, result.output
        assert ("give --add-bos" in result.output) == warned
        assert open_gguf(tmp_path / "x.gguf").keys["tokenizer.ggml.add_bos_token"] is added
        with llama(tmp_path / "x.gguf") as engine:
            assert engine.special["add_bos"] is added
    convert(folder, tmp_path / "x.gguf", "--force", "--add-bos")
    verify = [
        "verify",
        str(tmp_path / "x.gguf"),
        "--against",
        str(folder),
        "--windows",
        "1",
        "--length",
        "64",
    ]
    assert CliRunner().invoke(cli, [*verify, "--add-bos"]).exit_code == 0
    result = CliRunner().invoke(cli, verify)
    assert result.exit_code == 3
    assert "BOS is added" in result.output


def windows(folder: Path, tmp_path: Path, *options: str) -> str:
    """The fingerprint of the calibration windows of an importance matrix."""
    command = ["imatrix", str(folder), "-o", str(tmp_path / "i.gguf"), "--force", "--calib", "builtin"]
    result = CliRunner().invoke(cli, [*command, "--calib-samples", "2", "--calib-len", "32", *options])
    assert result.exit_code == 0, result.output
    return str(open_gguf(tmp_path / "i.gguf").keys["imatrix.datasets"])


def test_calibration_heeds_it(tmp_path: Path) -> None:
    lost, whole = sample(tmp_path / "lost", saved_by_5), sample(tmp_path / "whole", lambda folder: None)
    assert windows(lost, tmp_path) != windows(whole, tmp_path)
    assert windows(lost, tmp_path, "--add-bos") == windows(whole, tmp_path)
    assert windows(whole, tmp_path, "--no-add-bos") == windows(lost, tmp_path)


@pytest.mark.parametrize("command", ["gptq", "exl2"])
def test_the_folder_formats_take_the_options(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--help"])
    for option in ("--add-bos / --no-add-bos", "--calib-column"):
        assert option in result.output
