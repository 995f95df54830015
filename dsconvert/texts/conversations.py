"""Conversations from rows of data: chats in the usual spellings, and pairs of a question and its answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsconvert.errors import CheckpointError
from dsconvert.texts.files import Skipped, read_rows, whole

Message = dict[str, Any]
LISTS = ("messages", "conversations", "conversation", "dialog", "chat")
ROLES = {"human": "user", **dict.fromkeys(("gpt", "bing", "chatgpt", "model"), "assistant")}
# The columns of a question and of its answer, the first pair that a row has.
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("input", "output"),
)
MORE = ("input", "context")  # what an instruction is about
# What a message of a call of tools carries besides its text, for templates that write it.
KEPT = ("tool_calls", "tool_call_id", "name")
FORM = 'Each row should be {"messages": [{"role": "user", "content": "..."}, ...]}, or have a pair of columns'


def read_chats(path: Path, column: str = "", skipped: Skipped | None = None) -> Iterator[list[Message]]:
    """Conversations as lists of {"role", "content"}, one a row of JSON lines, a JSON array or parquet.

    A row is the list itself, holds it in a column of LISTS (or `column`), or is a pair of PAIRS.
    `from` and `value` are taken for `role` and `content`; of content in parts the texts are joined; a
    message without text that calls tools has the text "". Rows that are null there are counted in
    `skipped`. Raises CheckpointError for anything else.
    """
    for place, row in read_rows(path):
        found = _listed(row, column)
        if found is None and _is_null(row, column):
            if skipped is not None:
                skipped.add(place)
            continue
        if not found:
            keys = f"it holds {', '.join(map(str, row))[:100]}" if isinstance(row, dict) else ""
            pairs = ", ".join("/".join(pair) for pair in PAIRS)
            raise CheckpointError(f"{place} holds no messages", where=path, why=keys, hint=f"{FORM}: {pairs}")
        yield [_message(message, path, place) for message in found]


def holds_chat(row: object) -> bool:
    """Whether a row, or the columns of a table, are a conversation for `read_chats`."""
    if isinstance(row, list):
        return True
    return isinstance(row, Mapping) and (
        any(key in row for key in LISTS) or any(a in row and b in row for a, b in PAIRS)
    )


def _listed(row: object, column: str) -> list[Any] | None:
    """The messages of a row; None where it has none."""
    if isinstance(row, list):
        return row
    if not isinstance(row, dict):
        return None
    keys = (column,) if column else LISTS
    listed = next((row[key] for key in keys if row.get(key) is not None), None)
    if column or listed is not None:
        return listed if isinstance(listed, list) else None
    pair = next((pair for pair in PAIRS if all(row.get(key) is not None for key in pair)), None)
    return None if pair is None else _turns(row, *pair)


def _turns(row: Mapping[str, Any], question: str, answer: str) -> list[Any]:
    """A pair's messages; either side may be messages itself, as trl has it."""
    asked, given = row[question], row[answer]
    about = next((row[key] for key in MORE if key != question and isinstance(row.get(key), str)), "")
    if isinstance(asked, str) and about.strip() and question == "instruction":
        asked = f"{asked}\n\n{about}"
    system = row.get("system")
    turns: list[Any] = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    turns += asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    return [*turns, *(given if isinstance(given, list) else [{"role": "assistant", "content": given}])]


def _is_null(row: object, column: str) -> bool:
    """Whether the columns that could hold a conversation are there and one of them is null."""
    if row is None:
        return True
    if not isinstance(row, dict):
        return False
    if column:
        return column in row and row[column] is None
    lists = [row[key] for key in LISTS if key in row]
    pairs = [row[key] for pair in PAIRS if all(key in row for key in pair) for key in pair]
    return None in (lists or pairs)


def _message(raw: object, path: Path, place: str) -> Message:
    if isinstance(raw, dict):
        role, content = raw.get("role", raw.get("from")), _text(raw)
        if isinstance(role, str) and content is not None:
            kept = {key: raw[key] for key in KEPT if raw.get(key) is not None}
            return {"role": ROLES.get(role, role), "content": whole(content, path, place), **kept}
    raise CheckpointError(
        f"{place} holds a message without a role and a text",
        where=path,
        why=f"it holds {', '.join(map(str, raw))[:100]}" if isinstance(raw, dict) else "",
    )


def _text(raw: Mapping[str, Any]) -> str | None:
    """A message's text; that of parts is joined, pictures and such are left out."""
    content = raw.get("content", raw.get("value"))
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        return "".join(text for text in texts if isinstance(text, str))
    if content is None and (raw.get("tool_calls") or raw.get("function_call")):
        return ""
    return content if isinstance(content, str) else None


def without_tools(messages: list[Message]) -> list[Message]:
    """The conversation without calls of tools and what the tools said."""
    return [
        {"role": message["role"], "content": message["content"]}
        for message in messages
        if message["role"] not in ("tool", "function") and (message["content"] or "tool_calls" not in message)
    ]
