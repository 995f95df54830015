"""Calibration rows as people have them: chats, pairs, parts, calls of tools, nulls, columns by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from added_tokens import change, sample
from click.testing import CliRunner
from text_files import documents, finished, parquet

from dsconvert.cli import cli
from dsconvert.errors import CheckpointError, ConversionError, UsageError
from dsconvert.texts.builtin import evaluation_page
from dsconvert.texts.conversations import holds_chat, read_chats, without_tools
from dsconvert.texts.files import Skipped
from dsconvert.texts.sets import TextSet, chats, load_text

ASKED, TOLD = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "1"}

ROWS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, [ASKED, TOLD]),
    "alpaca, input null": ({"instruction": "q", "input": None, "output": "a"}, [ASKED, TOLD]),
    "alpaca with an input": (
        {"instruction": "q", "input": "on this", "output": "a", "text": "whole"},
        [{"role": "user", "content": "q\n\non this"}, TOLD],
    ),
    "dolly": (
        {"instruction": "q", "context": "on this", "response": "a", "category": "c"},
        [{"role": "user", "content": "q\n\non this"}, TOLD],
    ),
    "a system text beside": ({"system": "s", "question": "q", "response": "a"}, [SYSTEM, ASKED, TOLD]),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, [ASKED, TOLD]),
    "of messages": ({"prompt": [SYSTEM, ASKED], "completion": [TOLD]}, [SYSTEM, ASKED, TOLD]),
    "preferences": ({"prompt": "q", "chosen": "a", "rejected": "b"}, [ASKED, TOLD]),
    "question and answer": ({"question": "q", "answer": "a", "id": 3}, [ASKED, TOLD]),
    "input and output": ({"input": "q", "output": "a"}, [ASKED, TOLD]),
    "messages go before pairs": ({"messages": [ASKED], "prompt": "x", "completion": "y"}, [ASKED]),
    "messages null beside a pair": ({"messages": None, "prompt": "q", "completion": "a"}, [ASKED, TOLD]),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, TOLD]},
        [ASKED, TOLD],
    ),
    "parts with a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"},
                                                   {"type": "text", "text": "What is "},
                                                   {"type": "input_text", "text": "this?"}, "!"]}]},
        [{"role": "user", "content": "What is this?!"}],
    ),
    "calls of tools": (
        [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT, TOLD],
        [ASKED, CALLS, RESULT, TOLD],
    ),
    "no content beside the calls": ([{"role": "assistant", "tool_calls": [CALL]}, TOLD], [CALLS, TOLD]),
    "no calls": ([{**ASKED, "tool_calls": None, "name": None}, TOLD], [ASKED, TOLD]),
}  # fmt: skip


TABLES = [name for name, (row, _) in ROWS.items() if isinstance(row, dict) and not name.startswith("parts")]


@pytest.mark.parametrize(
    ("case", "form"),
    [(case, form) for case in ROWS for form in ("jsonl", "json")] + [(case, "parquet") for case in TABLES],
)
def test_rows_become_conversations(case: str, form: str, tmp_path: Path) -> None:
    row, expected = ROWS[case]
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        parquet(path, {key: [value, value] for key, value in row.items()})
    else:
        path.write_text(json.dumps([row, row]) if form == "json" else f"{json.dumps(row)}\n" * 2, "utf-8")
    assert list(read_chats(path)) == [expected] * 2


def test_a_table_fills_in_what_other_messages_have(tmp_path: Path) -> None:
    talk = [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT, TOLD]
    path = parquet(tmp_path / "rows.parquet", {"messages": [talk]})
    assert list(read_chats(path)) == [[ASKED, CALLS, RESULT, TOLD]]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_null_rows_are_left_out_and_counted(form: str, tmp_path: Path) -> None:
    path, skipped = tmp_path / f"rows.{form}", Skipped()
    values = [None, [ASKED, TOLD], None]
    if form == "parquet":
        parquet(path, {"messages": values})
    else:
        path.write_text("\n".join(json.dumps({"messages": value}) for value in values), "utf-8")
    assert list(read_chats(path, skipped=skipped)) == [[ASKED, TOLD]]
    place = "row 1" if form == "parquet" else "line 1"
    assert skipped.notes("x") == (f"x: 2 rows are null and left out, the first at {place}",)
    pairs, one = tmp_path / "pairs.jsonl", Skipped()
    pairs.write_text('{"prompt": "q", "completion": null}\n{"prompt": "q", "completion": "a"}', "utf-8")
    assert list(read_chats(pairs, skipped=one)) == [[ASKED, TOLD]]
    assert one.notes("x") == ("x: 1 row is null and left out, the first at line 1",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "x"}, r"holds no messages. it holds body.*instruction/output.*prompt/completion"),
        ({"messages": "text"}, "holds no messages"),
        ({"messages": []}, "holds no messages"),
        ({"prompt": 5, "completion": "a"}, "holds a message without a role and a text"),
        ({"messages": [{"role": "user", "content": None}]}, "holds a message without .* it holds role"),
        ({"messages": [{"content": "x"}]}, "holds a message without a role and a text"),
        (7, "holds no messages"),
    ],
)
def test_other_rows_are_named(row: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), "utf-8")
    with pytest.raises(CheckpointError, match=f"line 1 {message}"):
        list(read_chats(path))


def test_a_column_of_conversations_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [TOLD], "talk": [ASKED]}), "utf-8")
    assert list(read_chats(path)) == [[TOLD]]
    assert list(read_chats(path, "talk")) == [[ASKED]]
    with pytest.raises(CheckpointError, match="holds no messages"):
        list(read_chats(path, "nope"))


def local(path: Path, column: str = "") -> TextSet:
    return finished(load_text(str(path), "calibration", offline=True, column=column))


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_null_texts_are_left_out_with_a_note(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{form}"
    texts = ["one", None, "two", None]
    if form == "parquet":
        parquet(path, {"text": texts})
    else:
        rows = [json.dumps({"text": text}) for text in texts]
        path.write_text(f"[{','.join(rows)}]" if form == "json" else "\n".join(rows), "utf-8")
    text = local(path)
    assert documents(text) == ["one", "two"]
    place = "line 2" if form == "jsonl" else "row 2"
    assert text.notes == (f"rows.{form}: 2 rows are null and left out, the first at {place}",)


def test_null_text_beside_content_takes_the_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": null, "content": "c"}\n{"text": "t", "content": null}\nnull', "utf-8")
    text = local(path)
    assert documents(text) == ["c", "t"]
    assert len(text.notes) == 1
    path.write_text('{"text": null}', "utf-8")
    with pytest.raises(UsageError, match="holds no text"):
        local(path)


def test_a_column_of_text_by_name(tmp_path: Path) -> None:
    rows = {"text": ["x", "y"], "output": ["one", None]}
    table = parquet(tmp_path / "rows.parquet", rows)
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"text": "x", "output": "one"}\n{"output": null}', "utf-8")
    for path in (table, lines):
        text = local(path, "output")
        assert documents(text) == ["one"]
        assert "1 row is null" in text.notes[0]
        with pytest.raises(CheckpointError, match=r"no text as 'nope'. it holds output, text.*--calib"):
            local(path, "nope")
    plain = tmp_path / "a.txt"
    plain.write_text("plain")
    with pytest.raises(UsageError, match="has no column 'output': it is plain text"):
        local(plain, "output")
    for name in ("c4", "builtin"):
        with pytest.raises(UsageError, match="is for a file of rows"):
            finished(load_text(name, "calibration", offline=True, column="output"))


@pytest.mark.parametrize("row", [{"instruction": "q", "output": "a"}, {"messages": [ASKED]}])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_the_hint_for_conversations_is_true(row: dict[str, Any], form: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        parquet(path, {key: [value] for key, value in row.items()})
    else:
        path.write_text(json.dumps(row), "utf-8")
    with pytest.raises(CheckpointError, match="--calib-chat"):
        local(path)
    assert len(list(read_chats(path))) == 1


def test_what_holds_a_chat() -> None:
    assert holds_chat([ASKED])
    assert holds_chat({"prompt": 1, "completion": 2})
    assert not holds_chat({"prompt": 1, "answer": 2})
    assert not holds_chat("text")


def test_calls_of_tools_go_where_the_template_refuses_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps([ASKED, CALLS, RESULT, TOLD]) + "\n" + json.dumps([ASKED, TOLD]), "utf-8")

    def render(messages: list[dict[str, Any]]) -> str:
        if any(message["role"] == "tool" for message in messages):
            raise ConversionError("no tools here")
        return "".join(message["content"] for message in messages)

    text = chats(path, render)
    assert documents(text) == ["qa", "qa"]
    assert text.notes == ("rows.jsonl: the template refuses calls of tools, 1 of 2 conversations go without",)
    said = {"role": "assistant", "content": "I look."}
    assert without_tools([ASKED, {**CALLS, **said}]) == [ASKED, said]
    path.write_text(json.dumps([RESULT]), "utf-8")
    with pytest.raises(UsageError, match="refuses conversation 1"):
        chats(path, render)


GENERATION = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant: "
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}User: {{ m['content'] }}\n\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
TRIMMED = (
    "{% for m in messages %}\n    {%- generation %}\n{{ m.content }}\n    {%- endgeneration -%}\n  x\n"
    "{% endfor %}"
)


@pytest.mark.parametrize("template", [GENERATION, TRIMMED])
def test_the_tag_generation_is_rendered_as_transformers_does(template: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    from tokenizer_tools.load import load_tokenizer

    folder = sample(
        tmp_path / "model", lambda path: change(path / "tokenizer_config.json", chat_template=template)
    )
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    data = load_tokenizer(folder, 2048)
    assert not any("render" in note for note in data.notes), data.notes
    for messages in ([ASKED], [ASKED, TOLD], [SYSTEM, ASKED, TOLD, ASKED]):
        wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert data.render(messages) == wanted


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Explain", "input": "", "output": "{}"},
        {"messages": [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "{}"}]}]},
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT,
                      {"role": "assistant", "content": "{}"}]},
    ],
    ids=["alpaca", "parts", "tools"],
)  # fmt: skip
def test_the_command_calibrates_on_them(row: dict[str, Any], tmp_path: Path) -> None:
    page, path = evaluation_page(8000), tmp_path / "rows.jsonl"
    rows = [json.dumps(row).replace("{}", json.dumps(page[i * 200 :][:200])[1:-1]) for i in range(40)]
    path.write_text("\n".join(rows), "utf-8")
    command = ["imatrix", "sample:", "-o", str(tmp_path / "i.gguf"), "--calib-chat", str(path)]
    result = CliRunner().invoke(cli, [*command, "--calib-samples", "4", "--calib-len", "32"])
    assert result.exit_code == 0, result.output
    assert "drawing 4 windows of 32 tokens from rows.jsonl" in result.output
