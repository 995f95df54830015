"""The Modelfile of `dsconvert gguf --ollama`: what it says, and whose files it leaves alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import parrot
import pytest
import tiny
from added_tokens import change
from click.testing import CliRunner, Result

from converters.gguf import modelfile
from dsconvert.cli import cli
from tokenizer_tools import chat_template
from tokenizer_tools.load import load_tokenizer


def convert(model: object, out: Path, *more: object) -> Result:
    words = ["gguf", model, "-q", "q8_0", "-o", out, "--effort", "off", "--ollama", *more]
    return CliRunner().invoke(cli, [str(word) for word in words])


def pieces(lines: str, role: str) -> list[str]:
    """The texts in Go's quotes in the branch of a role; JSON reads the escapes that are used."""
    branch = re.search(rf'if eq .Role "{role}" }}}}(.*)$', lines, re.MULTILINE)
    assert branch is not None
    return [json.loads(found) for found in re.findall(r'\{\{ ("(?:[^"\\]|\\.)*") \}\}', branch[1])]


def test_the_sample_gets_its_template_its_stop_and_how_its_tokens_are_drawn(tmp_path: Path) -> None:
    result = convert("sample:", tmp_path / "a.gguf")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "Modelfile").read_text("utf-8")
    assert f"ollama create NAME -f {tmp_path / 'Modelfile'}" in result.stderr
    lines = text.splitlines()
    assert lines[0].startswith("# Written by dsconvert ")
    assert lines[1] == "FROM ./a.gguf"
    eos = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    assert lines[-3:] == [f'PARAMETER stop "{eos}"', "PARAMETER temperature 0.7", "PARAMETER top_p 0.95"]
    # BOS, which the jinja writes, is what the runtime puts before a prompt.
    assert "begin" not in text
    assert pieces(text, "user") == ["User: ", "\n\n"]
    assert pieces(text, "assistant") == ["Assistant: ", eos]
    assert pieces(text, "system") == ["\n\n"]
    assert '{{ if not $last }}{{ "' + eos in text
    assert text.count('"""') == 2


def test_every_end_is_a_stop_also_one_that_no_key_carries(tmp_path: Path) -> None:
    folder = parrot.parrot(tmp_path / "m")
    result = convert(folder, tmp_path / "a.gguf")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "Modelfile").read_text("utf-8")
    assert f'PARAMETER stop "{tiny.EOS}"\nPARAMETER stop "{parrot.TURN}"' in text


def test_a_projector_and_several_types(tmp_path: Path) -> None:
    result = convert("sample-vl:", tmp_path / "a.gguf", "--quant", "q8_0,q4_0")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.glob("Modelfile*")) == ["Modelfile-q4_0", "Modelfile-q8_0"]
    text = (tmp_path / "Modelfile-q4_0").read_text("utf-8")
    assert "\nFROM ./a-q4_0.gguf\nFROM ./mmproj-a.gguf\n" in text
    assert "You are a helpful language and vision assistant" in text


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    for name, template, said in (
        ("plain", "", "has no chat template"),
        ("odd", "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", "cannot be written"),
    ):
        folder = parrot.parrot(tmp_path / name, template)
        result = convert(folder, folder / "a.gguf")
        assert result.exit_code == 0, result.output
        assert said in result.stderr
        text = (folder / "Modelfile").read_text("utf-8")
        assert "TEMPLATE" not in text
        assert "PARAMETER stop" in text


def test_ours_is_replaced_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "Modelfile"
    for _ in range(2):
        assert convert("sample:", tmp_path / "a.gguf", "--force").exit_code == 0
    written = target.read_text("utf-8")
    for other in ("FROM llama3\n", written + "SYSTEM You are a pirate.\n", written.replace("0.7", "0.1")):
        target.write_text(other, "utf-8")
        result = convert("sample:", tmp_path / "b.gguf")
        assert result.exit_code == 2
        assert "exists already and is not a Modelfile as dsconvert wrote it" in result.stderr
        assert target.read_text("utf-8") == other
        assert not (tmp_path / "b.gguf").exists()


def test_no_modelfile_without_the_option_or_in_a_dry_run(tmp_path: Path) -> None:
    assert convert("sample:", tmp_path / "a.gguf", "--dry-run").exit_code == 0
    words = ["gguf", "sample:", "-q", "q8_0", "-o", str(tmp_path / "a.gguf"), "--effort", "off"]
    assert CliRunner().invoke(cli, words).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_bos_before_every_question_stays_before_all_but_the_first(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[{{ m.content }}]"
    template += "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    folder = tiny.tiny_checkpoint(tmp_path / "m")
    change(folder / "tokenizer_config.json", chat_template=template)
    data = load_tokenizer(folder, 512)
    turns = modelfile.turns_of(data)
    assert turns is not None
    roles = ("user", "assistant", "user")
    talk = [{"role": role, "content": f"x{n}"} for n, role in enumerate(roles)]
    wanted = chat_template.render(template, talk, bos_token=tiny.BOS, eos_token=tiny.EOS)
    assert tiny.BOS + turns.write(talk) == wanted


@pytest.mark.parametrize(
    ("piece", "wanted"),
    [
        ('a"b\\\n', '"a\\"b\\\\\\n"'),
        ("\u4f60\uff5c", '"\u4f60\uff5c"'),
        ("\u202e\x7f", '"\\U0000202e\\U0000007f"'),
        ("\x01", '"\\u0001"'),
    ],
)
def test_texts_in_gos_quotes(piece: str, wanted: str) -> None:
    assert modelfile.go_string(piece) == wanted
