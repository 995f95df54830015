"""Chat templates in their own process: bombs are stopped, usual ones give what transformers gives."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from tiny_tokenizer import rows, tokenizer_json, write

from dsconvert.errors import UsageError
from tokenizer_tools import chat_template, rendering
from tokenizer_tools.load import load_tokenizer

MEMORY = ("MemoryError",)
TIME = ("TimeoutError: took more than",)
EITHER = MEMORY + TIME
# One line asks for gigabytes or for hours: while it is compiled, inside one C function, or in its loops.
BOMBS = {
    "format": ("{{ '%3000000000d' % 5 }}", MEMORY),
    "center": ("{{ 'a'|center(3000000000) }}", MEMORY),
    "indent": ("{{ 'a\nb'|indent(2000000000) }}", MEMORY),
    "tojson": ("{{ [1]|tojson(indent=1000000000) }}", MEMORY),
    "batch": ("{{ [1]|batch(300000000, 0)|list }}", MEMORY),
    "slice": ("{{ [1]|slice(1000000000)|list }}", EITHER),
    "round": ("{{ 1.5|round(100000000, 'ceil') }}", EITHER),
    "strftime_now": ("{{ strftime_now('%Y'|center(900000000)) }}", MEMORY),
    "many expressions": ("{{ a }}" * 500_000, EITHER),
    "product": ("{{ 'x' * 9999999999 }}", MEMORY),
    "power": ("{{ 2 ** 999999999 }}", (*EITHER, "ValueError: Exceeds the limit")),
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TIME),
    "doubling": (
        "{% set n = namespace(t='x') %}{% for a in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}",
        MEMORY,
    ),
    "long text": (
        "{% for a in range(99999) %}{{ 'x'|center(9999) }}{% endfor %}",
        ("ValueError: gives more than 32 million",),
    ),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", ("RecursionError",)),
    "nesting": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", ("RecursionError",)),
}


@pytest.mark.parametrize(("text", "said"), BOMBS.values(), ids=BOMBS)
def test_a_bomb_ends_and_is_named(text: str, said: tuple[str, ...]) -> None:
    (note,) = chat_template.check(chat_template.ChatTemplates(text))
    assert note.startswith("the chat template 'default' does not render a plain dialogue (")
    assert any(part in note for part in said), note
    assert chat_template.render("{{ messages[0].content }}") == "Hello, who are you?"


def test_after_a_bomb_the_others_are_not_tried() -> None:
    found = chat_template.ChatTemplates(BOMBS["product"][0], {"tool": "{{ 'a' * 99999999999 }}", "rag": "r"})
    first, second = chat_template.check(found)
    assert "'default'" in first
    assert second == "2 more chat templates were not tried"


def test_no_more_than_some_templates_are_tried() -> None:
    named = {f"n{i}": "{{ raise_exception('no') }}" for i in range(99)}
    notes = chat_template.check(chat_template.ChatTemplates("", named))
    assert len(notes) == chat_template.TRIED + 1
    assert notes[-1] == f"{99 - chat_template.TRIED} more chat templates were not tried"


@pytest.mark.parametrize(
    "text",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ (1).__class__ }}{{ self.__init__() }}"],
)
def test_the_sandbox_is_closed(text: str) -> None:
    with pytest.raises(rendering.Unrendered, match="SecurityError"):
        chat_template.render(text)


# As DeepSeek's R1 and V3.1 write calls of tools, their results, and thinking that is left out or begun.
CALLS = """{% if not thinking is defined %}{% set thinking = false %}{% endif %}
{%- set ns = namespace(first=true, tool=false, user=false, system='') -%}
{%- for m in messages -%}{%- if m['role'] == 'system' -%}
{%- set ns.system = ns.system + ('\n\n' if ns.system else '') + m['content'] -%}{%- endif -%}{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}{%- set ns.tool = false -%}{%- set ns.user = true -%}<U>{{ m['content'] }}
  {%- elif m['role'] == 'assistant' and m['tool_calls'] is defined and m['tool_calls'] is not none -%}
    {{ '<A></think>' if ns.user }}{%- set ns.user = false -%}{%- set ns.first = true -%}
    {%- for call in m['tool_calls'] -%}
      {%- if ns.first and m['content'] is not none -%}{{ m['content'] }}{%- endif -%}
      {{ '<calls>' if ns.first else '\n' }}<call>{{ call['type'] + '<sep>' + call['function']['name'] }}
      {{- '\n```json\n' + call['function']['arguments'] + '\n```' }}{%- set ns.first = false -%}
    {%- endfor -%}</calls>{{ eos_token }}
  {%- elif m['role'] == 'assistant' -%}
    {%- if ns.user -%}<A>
      {{- '<think>' if m['prefix'] is defined and m['prefix'] and thinking else '</think>' }}
    {%- endif -%}{%- set ns.user = false -%}{%- set content = m['content'] -%}
    {%- if '</think>' in content -%}{%- set content = content.split('</think>', 1)[1] -%}{%- endif -%}
    {{ content + eos_token }}
  {%- elif m['role'] == 'tool' -%}{%- set ns.tool = true -%}{%- set ns.user = false -%}
    <output>{{ m['content'] }}</output>
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.user and not ns.tool -%}<A>{{ '<think>\n' if thinking else '</think>' }}
{%- endif -%}"""
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": "\u00e9\\n"}'}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Call f."},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "<think>2?</think>\n\nIt is 2."},
    {"role": "user", "content": "  Thanks.\n"},
]
SPECIAL = {"bos_token": "<B>", "eos_token": "<E>"}

GOOD: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (
        "{{ bos_token }}{% for m in messages %}\n  {% if m['role'] == 'user' %}\nUser: {{ m.content }}\n"
        "  {% else %}\n{{ m.content }}{{ eos_token }}\n  {% endif %}\n{% endfor %}\n"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        {"bos_token": "<B>", "eos_token": "<E>"},
    ),
    "loop controls": (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        {},
    ),
    "generation": (
        "{% for m in messages %}{% set x = m.role %}\n{% generation %}\n {{ x }}{{ m.content }} \n"
        "{% endgeneration %}\n{% endfor %}",
        {},
    ),
    "tojson": (
        "{{ tools | tojson(indent=2) }}{{ {'b': '<é>', 'a': 1} | tojson }}"
        "{{ {'b': 'é', 'a': [1, 2]} | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": 1.5, "y": None}}}]},
    ),
    "strftime_now": ("{{ strftime_now('%Y') }}{{ strftime_now('%%') }}", {}),
    "rulers": ("{{ '-' * 40 }}{{ 'ab' * 3 }}{{ [0] * 2 }}", {}),
    "namespace": (
        "{% set n = namespace(s=0) %}{% for m in messages %}{% set n.s = n.s + 1 %}{% endfor %}{{ n.s }}",
        {},
    ),
    "undefined": ("{{ nothing }}{% if nothing is defined %}1{% endif %}{{ messages[9] }}|", {}),
    "calls": (CALLS, {"messages": TALK, **SPECIAL}),
    "calls, thinking": (CALLS, {"messages": TALK, "thinking": True, **SPECIAL}),
    "thinking begun": (
        CALLS,
        {
            "messages": [TALK[1], {"role": "assistant", "content": "So", "prefix": True}],
            "thinking": True,
            "add_generation_prompt": False,
            **SPECIAL,
        },
    ),
    "documents": ("{{ documents }}{{ tools is none }}", {}),
}


@pytest.mark.parametrize(("text", "values"), GOOD.values(), ids=GOOD)
def test_the_usual_templates_give_what_transformers_gives(text: str, values: dict[str, Any]) -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    asked = {"messages": list(chat_template.DIALOGUE), "add_generation_prompt": True}
    theirs = _compile_jinja_template(text).render(**{**asked, "tools": None, "documents": None, **values})
    assert chat_template.render(text, **values) == theirs


NULL = [{"role": "user", "content": None}, {"role": "assistant", "content": "a", "tool_calls": None}]
KEPT: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "nulls": (
        "{% for m in messages %}{{ m.content is defined }}{{ m.tool_calls is defined }}{% endfor %}",
        NULL,
    ),
    "reasoning": (
        "{% for m in messages %}{{ m.reasoning_content }}/{{ m.thinking }}|{% endfor %}",
        [{"reasoning": "r"}, {"thinking": "t"}, {"reasoning_content": "c", "thinking": "t"}, {"content": ""}],
    ),
    "a call": (CALLS, TALK),
}


@pytest.mark.parametrize("name", KEPT)
def test_messages_reach_a_template_as_transformers_gives_them(name: str) -> None:
    """Where that fails, as DeepSeek's templates do on a call without content, as they are."""
    from jinja2 import UndefinedError
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    template, messages = KEPT[name]
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    given = {"add_generation_prompt": True, "tokenize": False, "chat_template": template}
    try:
        expected = theirs.apply_chat_template(messages, **given, **SPECIAL)
    except UndefinedError:
        assert name == "a call"
        expected = chat_template.rendering.render(
            template, {"messages": messages, "add_generation_prompt": True, **SPECIAL}
        )
    assert chat_template.render(template, messages, **SPECIAL) == expected


def test_text_goes_there_and_back_unchanged() -> None:
    content = "".join(map(chr, range(0x300))) + "\u2028\U0001f600\x00" + "long " * 100_000
    assert (
        chat_template.render("{{ messages[0].content }}", [{"role": "user", "content": content}]) == content
    )


def test_a_process_that_is_gone_is_started_again() -> None:
    assert chat_template.render("a") == "a"
    os.kill(rendering._running[0].child.pid, signal.SIGKILL)
    rendering._running[0].child.wait()
    assert chat_template.render("b") == "b"


def test_chats_with_a_template_that_breaks_give_the_ordinary_error(tmp_path: Any) -> None:
    raw = tokenizer_json()
    write(tmp_path, raw, {"chat_template": "{{ 'x' * messages[0].content|length ** 12 }}"})
    data = load_tokenizer(tmp_path, rows(raw))
    with pytest.raises(UsageError, match=r"cannot be written with the chat template.*MemoryError"):
        data.render([{"role": "user", "content": "0123456789"}])
