"""Chat templates: collected as transformers looks for them, and tried on a plain dialogue."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from dsconvert import reading
from dsconvert.errors import TokenizerError
from tokenizer_tools.library import read_object

SECONDS = 5.0
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
    """The prompt that a template makes of messages, rendered as transformers does (sandboxed jinja2).

    Raises whatever the template or jinja2 raises; TimeoutError after five seconds in the template's loops.
    """
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        # A product can ask for any amount of memory in one step.
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if not all(isinstance(x, (int, float)) and abs(x) < 1 << 20 for x in (left, right)):
                raise ValueError(f"{operator} of anything but small numbers")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = time.strftime
    environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, indent=kw.get("indent"))
    compiled = environment.from_string(template)
    values = {"messages": list(messages), "add_generation_prompt": True, "tools": None, "documents": None}
    return _in_time(lambda: compiled.render(**{**values, **variables}))


def _in_time(call: Any) -> str:
    """Runs `call`, raising TimeoutError from inside it when SECONDS have passed."""
    end = time.monotonic() + SECONDS
    tracer = sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"did not finish in {SECONDS:g} seconds")
        return trace

    sys.settrace(trace)
    try:
        return str(call())
    finally:
        sys.settrace(tracer)


def check(templates: ChatTemplates, **variables: Any) -> tuple[str, ...]:
    """Notes on templates that do not render a plain dialogue; empty when all do.

    A template that only takes other content (images, tools) is no error: the note says what it said.
    """
    texts = {"default": templates.default, **templates.named}
    notes = []
    for name, text in texts.items():
        if text:
            try:
                render(text, **variables)
            except ImportError:
                return ("jinja2 is not installed, so the chat template was not tried",)
            except Exception as error:
                said = f"{type(error).__name__}: {str(error)[:200]}"
                notes.append(f"the chat template {name!r} does not render a plain dialogue ({said})")
    return tuple(notes)
