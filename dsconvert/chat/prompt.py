"""The prompt of a conversation: messages in the model's template, the oldest left out where it is full."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsconvert.chat.model import ChatText, Part, once
from dsconvert.errors import UsageError
from tokenizer_tools import chat_template
from tokenizer_tools.rendering import Unrendered

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
Embed = Callable[[str, Sequence[Path]], list[Part]]


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    text: str
    pictures: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model takes it, the messages that are in it, and what the user should know of it."""

    parts: tuple[Part, ...]
    messages: tuple[Message, ...]
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """How many positions it takes."""
        return sum(map(len, self.parts))


def fitting(text: ChatText, embed: Embed, messages: Sequence[Message], context: int, room: int) -> Prompt:
    """The prompt of a conversation that leaves `room` of `context` tokens for the answer, if need be without
    its oldest turns; the system message and the last one always stay.

    Raises UsageError when these alone do not fit, or the template takes no such conversation.
    """
    kept, dropped = tuple(messages), 0
    while True:
        rendered, notes = render(text, kept)
        pictures = [picture for message in kept for picture in message.pictures]
        parts = once(text, embed(rendered, pictures))
        size = sum(map(len, parts))
        if not size:
            raise UsageError("the message has no tokens", where=text.where, hint="Write something")
        if size + room <= context:
            break
        shorter = without_oldest(kept)
        if shorter == kept:
            if size < context:
                break
            raise UsageError(
                f"the message does not fit: with what stands around it it has {size} tokens",
                where=text.where,
                why=f"the context has {context}",
                hint=f"Give --context {2 * size}, or a shorter message",
            )
        dropped += len(kept) - len(shorter)
        kept = shorter
    if dropped:
        notes = (
            *notes,
            f"the context of {context} tokens is full: the oldest {dropped} messages were dropped",
        )
    return Prompt(tuple(parts), kept, notes)


def without_oldest(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages without the oldest question and its answer; the system message and the last one stay."""
    first = 1 if messages and messages[0].role == SYSTEM else 0
    after = next((at for at in range(first + 1, len(messages)) if messages[at].role == USER), None)
    return messages if after is None else messages[:first] + messages[after:]


def render(text: ChatText, messages: Sequence[Message]) -> tuple[str, tuple[str, ...]]:
    """The text of a conversation up to where the answer begins, and notes.

    In the model's template; without one the messages as they are, one after another. A template that takes
    no system message gets it before the first question. Raises UsageError with what the template says.
    """
    if not text.template:
        return continued(messages), ()
    try:
        return _rendered(text, messages), ()
    except Unrendered as error:
        said = error
    if messages and messages[0].role == SYSTEM:
        try:
            note = "the model's template takes no system message: it stands before the first question"
            return _rendered(text, _with_system_inside(messages)), (note,)
        except Unrendered:
            pass
    raise UsageError(
        "the conversation cannot be written in the model's chat template",
        where=text.where,
        why=str(said)[:200],
        hint="dsconvert inspect shows the template, tokenizer.chat_template",
    )


def continued(messages: Iterable[Message]) -> str:
    """The text of a model without a template: a message of the user begins a line."""
    parts = ""
    for message in messages:
        joint = "\n" if parts and message.role == USER and not parts.endswith("\n") else ""
        parts += joint + message.text
    return parts


def _rendered(text: ChatText, messages: Sequence[Message]) -> str:
    """With the marker of each picture before the text; in parts where a template takes no strings, of which
    some say so and others write nothing.
    """
    said = None
    for written in (_plain, _in_parts):
        try:
            found = _in_template(text, [written(message, text.marker) for message in messages])
        except Unrendered as error:
            said = said or error
            continue
        if messages[-1].text.strip() in found:
            return found
    raise said or Unrendered("ValueError", "it leaves out what the message says")


def _in_template(text: ChatText, messages: list[dict[str, Any]]) -> str:
    return chat_template.render(text.template, messages, **text.names)


def _plain(message: Message, marker: str) -> dict[str, Any]:
    return {"role": message.role, "content": marker * len(message.pictures) + message.text}


def _in_parts(message: Message, marker: str) -> dict[str, Any]:
    content = [{"type": "text", "text": part} for part in (*[marker] * len(message.pictures), message.text)]
    return {"role": message.role, "content": content}


def _with_system_inside(messages: Sequence[Message]) -> list[Message]:
    system, first, *rest = messages
    return [replace(first, text=f"{system.text}\n\n{first.text}"), *rest]
