"""The pieces of a chat template, found by rendering it: the same prompts, or none."""

from __future__ import annotations

import pytest

from tokenizer_tools import chat_template
from tokenizer_tools.turns import Message, find_turns
from tokenizer_tools.vision_template import vision_template

LOOP = "{% for m in messages %}"
ASK = "{% endfor %}{% if add_generation_prompt %}"
TEMPLATES = {
    "named roles": LOOP + "<|{{ m.role }}|>\n{{ m.content }}<end>\n" + ASK + "<|assistant|>\n{% endif %}",
    "a system text of its own": LOOP
    + "{% if loop.first and m.role != 'system' %}<system>Be good.</s>{% endif %}"
    + "<{{ m.role }}>{{ m.content }}</s>"
    + ASK
    + "<assistant>{% endif %}",
    "eos behind answers": "{{ bos_token }}"
    + LOOP
    + "{% if m.role == 'user' %}User: {{ m.content }}\n\n"
    + "{% elif m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}"
    + "{% else %}{{ m.content }}\n\n{% endif %}"
    + ASK
    + "Assistant:{% endif %}",
    "a system message inside the question": "{% if messages[0].role == 'system' %}"
    + "{% set talk, s = messages[1:], '<<SYS>>' + messages[0].content + '<</SYS>>' %}"
    + "{% else %}{% set talk, s = messages, '' %}{% endif %}"
    + "{% for m in talk %}{% if m.role == 'user' %}"
    + "{{ bos_token }}[INST] {% if loop.first %}{{ s }}{% endif %}"
    + "{{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "no system message": "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    + LOOP
    + "<{{ 'model' if m.role == 'assistant' else m.role }}>{{ m.content }}</s>"
    + ASK
    + "<model>{% endif %}",
    "pictures": vision_template("<image>"),
}
NONE = {
    "numbered": LOOP + "{{ loop.index }}. {{ m.content }}{% endfor %}",
    "the last question is another": LOOP + "{% if loop.last %}LAST {% endif %}[{{ m.content }}]{% endfor %}",
    "old answers are cut": LOOP
    + "{% if m.role == 'assistant' %}-{% else %}[{{ m.content }}]{% endif %}{% endfor %}",
    "capitals": LOOP + "[{{ m.content | upper }}]{% endfor %}",
    "raises": "{{ raise_exception('no') }}",
    "does not parse": "{% for %}",
    "one question only": "{{ messages[0].content }}",
}


def talks(system: bool) -> list[list[Message]]:
    first = [{"role": "system", "content": "S \u4f60"}] if system else []
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": f"{n} {{{{ x }}}} \\n" + "y"} for n in range(9)]
    return [[*first, *turns[:count]] for count in (1, 3, 5, 7, 9)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_pieces_write_what_the_template_writes(name: str) -> None:
    template = TEMPLATES[name]
    turns = find_turns(template, "<s>", "</s>")
    assert turns is not None
    assert ("system" in turns.before) == (name != "no system message")
    for talk in talks(False) + (talks(True) if "system" in turns.before else []):
        assert turns.write(talk) == chat_template.render(template, talk, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", NONE)
def test_a_template_that_looks_at_more_than_the_role_has_none(name: str) -> None:
    assert find_turns(NONE[name], "<s>", "</s>") is None


def test_an_answer_ends_as_a_question_does_where_both_are_possible() -> None:
    turns = find_turns(TEMPLATES["named roles"], "", "")
    assert turns is not None
    assert turns.before == {role: f"<|{role}|>\n" for role in ("system", "user", "assistant")}
    assert turns.after == dict.fromkeys(turns.before, "<end>\n")
    assert (turns.head, turns.ask) == ("", "<|assistant|>\n")


def test_an_answer_that_goes_on_is_left_open() -> None:
    turns = find_turns(TEMPLATES["eos behind answers"], "<s>", "</s>")
    assert turns is not None
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    assert turns.write(talk) == "<s>User: Hi\n\nAssistant: Well,"
