"""What a chat template writes around each message, found by rendering: for runtimes that run no jinja.

A template whose conversations are its pieces one after another has `Turns`; any other has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizer_tools import chat_template
from tokenizer_tools.rendering import Unrendered

Message = dict[str, str]
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
WORDS = ("Zqsys", "Zqone", "Zqans", "Zqtwo", "Zqsaid", "Zqlast")  # no template has these


@dataclass(frozen=True)
class Turns:
    """The text around messages: `before` and `after` each by its role; `head` stands before a conversation
    without a system message, `ask` where the answer begins. A template that takes no system message has none
    in `before`.
    """

    head: str
    before: dict[str, str]
    after: dict[str, str]
    ask: str

    def write(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation; an answer at its end is left open, as one that goes on."""
        text = "" if messages[0]["role"] == SYSTEM else self.head
        for message in messages:
            role = message["role"]
            last = message is messages[-1] and role == ASSISTANT
            text += self.before[role] + message["content"] + ("" if last else self.after[role])
        return text + ("" if messages[-1]["role"] == ASSISTANT else self.ask)


def find_turns(template: str, bos: str, eos: str) -> Turns | None:
    """The pieces of a template, proven on conversations of up to six messages; None where it has no such.

    `bos` and `eos` are the texts of its variables bos_token and eos_token.

    >>> text = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    >>> find_turns(text, "", "").write([{"role": "user", "content": "Hi"}])
    '[user]Hi[assistant]'
    """
    names = {"bos_token": bos, "eos_token": eos}
    try:
        return _found(template, names)
    except Unrendered:
        return None


def _found(template: str, names: dict[str, str]) -> Turns | None:
    def render(messages: Sequence[Message], ask: bool = True) -> str:
        return chat_template.render(template, messages, **names, add_generation_prompt=ask)

    def parts(messages: Sequence[Message], ask: bool = True) -> list[str] | None:
        """What is between the contents, and around them."""
        text, found = render(messages, ask), []
        for message in messages:
            before, there, text = text.partition(message["content"])
            if not there:
                return None
            found.append(before)
        return [*found, text]

    one, two = parts(_talk(1)), parts(_talk(3))
    closed = parts(_talk(1), ask=False)
    if one is None or two is None or closed is None or not one[1].startswith(closed[1]):
        return None
    start, after_user = closed
    if not two[1].startswith(after_user):
        return None
    try:
        system = parts(_talk(2, system=True))
    except Unrendered:
        system = None
    before_user = _common_end([start, two[2], *([system[1]] if system else [])])
    if two[2].startswith(after_user) and before_user.endswith(two[2][len(after_user) :]):
        before_user = two[2][len(after_user) :]  # an answer ends as a question does
    cut = len(before_user)
    before = {USER: before_user, ASSISTANT: two[1][len(after_user) :]}
    after = {USER: after_user, ASSISTANT: two[2][: len(two[2]) - cut]}
    if system is not None:
        before[SYSTEM], after[SYSTEM] = system[0], system[1][: len(system[1]) - cut]
    turns = Turns(start[: len(start) - cut], before, after, one[1][len(after_user) :])
    tried = [_talk(1), _talk(3), _talk(5)]
    tried += [_talk(2, system=True), _talk(6, system=True)] if system is not None else []
    return turns if all(turns.write(talk) == render(talk) for talk in tried) else None


def _talk(count: int, system: bool = False) -> list[Message]:
    """So many messages: questions and answers in turn, behind a system message if asked for."""
    roles = ([SYSTEM] if system else []) + [USER, ASSISTANT] * count
    words = WORDS if system else WORDS[1:]
    return [{"role": r, "content": w} for r, w in zip(roles[:count], words, strict=False)]


def _common_end(texts: Sequence[str]) -> str:
    """The longest text that all end with."""
    first = min(texts, key=len)
    same = next((n for n in range(len(first), 0, -1) if all(t.endswith(first[-n:]) for t in texts)), 0)
    return first[len(first) - same :]
