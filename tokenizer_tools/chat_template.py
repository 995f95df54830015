"""Chat templates: collected as transformers looks for them, and tried on a plain dialogue."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsconvert import reading
from dsconvert.errors import TokenizerError
from tokenizer_tools import rendering
from tokenizer_tools.library import read_object
from tokenizer_tools.rendering import Unrendered

TRIED = 32  # named templates of one model; published ones have up to three
REASONING = ("reasoning_content", "thinking", "reasoning")
DIALOGUE = (
    {"role": "user", "content": "Hello, who are you?"},
    {"role": "assistant", "content": "A test."},
    {"role": "user", "content": "Thanks."},
)


@dataclass(frozen=True)
class ChatTemplates:
    """The default template's text ("" when there is none), named ones, and what the user should know."""

    default: str = ""
    named: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def collect(folder: Path) -> ChatTemplates:
    """The templates of a checkpoint folder.

    As in transformers: `chat_template.jinja` and `additional_chat_templates/NAME.jinja` win over
    `chat_template.json`, which wins over `tokenizer_config.json`. Files that contradict each other give a
    note. Raises TokenizerError for a template that is not text.

    >>> from dsconvert.checkpoints.locate import locate
    >>> templates = collect(locate("sample:"))
    >>> "assistant" in templates.default, templates.named
    (True, {})
    """
    sources: dict[str, dict[str, str]] = {
        "tokenizer_config.json": _templates(
            read_object(folder / "tokenizer_config.json").get("chat_template"), "tokenizer_config.json"
        ),
        "chat_template.json": _templates(_legacy(folder / "chat_template.json"), "chat_template.json"),
        "chat_template.jinja": _jinja_files(folder),
    }
    merged: dict[str, str] = {}
    notes = []
    for file, found in sources.items():
        for name, text in found.items():
            if merged.get(name, text) != text:
                notes.append(f"{file} contradicts another file on the chat template {name!r}; {file} wins")
            merged[name] = text
    default = merged.pop("default", "")
    return ChatTemplates(default, merged, tuple(notes))


def _legacy(path: Path) -> object:
    """The value under "chat_template", or the whole file where it is a bare JSON string."""
    if not os.path.lexists(path):
        return None
    value = reading.read_json(path, reading.CONFIG, TokenizerError)
    return (
        value
        if isinstance(value, str)
        else reading.as_object(value, path, TokenizerError).get("chat_template")
    )


def _jinja_files(folder: Path) -> dict[str, str]:
    own = folder / "chat_template.jinja"
    named = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    found = {"default": _jinja(own)} if os.path.lexists(own) else {}
    return found | {path.stem: _jinja(path) for path in named}


def _jinja(path: Path) -> str:
    return reading.read_text(path, reading.TEMPLATE, TokenizerError)


def _templates(raw: object, where: str) -> dict[str, str]:
    """A template, or a list of {name, template}, as name -> text."""
    if raw is None:
        return {}
    if isinstance(raw, str):
        return {"default": raw}
    if isinstance(raw, dict):
        raw = [{"name": name, "template": text} for name, text in raw.items()]
    entries = raw if isinstance(raw, list) else [raw]
    found = {}
    for entry in entries:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise TokenizerError(
                "chat_template is neither text nor a list of named texts",
                where=where,
                hint="Fetch the file again, or remove the key",
            )
        found[name] = text
    return found


def render(template: str, messages: Any = DIALOGUE, **variables: Any) -> str:
    """The prompt that a template makes of messages, rendered as transformers does, in a process of its own.

    As there, a key whose value is null is left out, and reasoning goes by all its names. A template that
    fails on that gets the messages as they are: DeepSeek's ask of a call whether its content is none.
    Raises Unrendered with what the template or jinja2 raises, or with the limit that it goes over.

    >>> render("{% for m in messages %}Q: {{ m.content }}{% endfor %}", [{"role": "user", "content": "Hi"}])
    'Q: Hi'
    """
    given = [_aliased(message) for message in messages]
    kept = [_without_nulls(message) for message in given]
    values = {"add_generation_prompt": True, "tools": None, "documents": None, **variables}
    try:
        return rendering.render(template, {"messages": kept, **values})
    except Unrendered as error:
        if kept == given or error.broke:
            raise
        with suppress(Unrendered):
            return rendering.render(template, {"messages": given, **values})
        raise


def _without_nulls(message: Any) -> Any:
    keys = message.items() if isinstance(message, Mapping) else None
    return message if keys is None else {key: value for key, value in keys if value is not None}


def _aliased(message: Any) -> Any:
    """A message with its reasoning under `reasoning_content`, which templates read, and `thinking`."""
    if not isinstance(message, Mapping):
        return message
    found = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def check(templates: ChatTemplates, **variables: str) -> tuple[str, ...]:
    """Notes on templates that do not render a plain dialogue; empty when all do.

    A template that only takes other content (images, tools) is not an error: the note repeats its message.
    After one that goes over a limit, and after TRIED, no other is tried.
    """
    texts = {name: text for name, text in {"default": templates.default, **templates.named}.items() if text}
    notes: list[str] = []
    for number, (name, text) in enumerate(texts.items()):
        said, broke = _try(text, tuple(variables.items()))
        if said:
            notes.append(f"the chat template {name!r} does not render a plain dialogue ({said})")
        left = len(texts) - number - 1
        if left and (broke or number + 1 == TRIED):
            notes.append(f"{left} more chat templates were not tried")
            break
    return tuple(notes)


@lru_cache(maxsize=TRIED)
def _try(text: str, variables: tuple[tuple[str, str], ...]) -> tuple[str, bool]:
    """What a template says instead of rendering a plain dialogue, and whether it went over a limit."""
    try:
        render(text, **dict(variables))
    except Unrendered as error:
        return str(error)[:230], error.broke
    return "", False
