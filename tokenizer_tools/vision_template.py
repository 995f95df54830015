"""A chat template for models that see pictures, as servers use it: content is a string, or parts.

The models' own prompt is the conversation format "deepseek" of {deepseek_vl,janus}/utils/conversation.py with
the system text of their processors; transformers' templates for it take parts only and fail on strings, which
llama.cpp's server sends. This one renders the same text on plain dialogues. It writes no BOS: the tokenizer
adds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsconvert.errors import CheckpointError
from tokenizer_tools.vocabulary import CONTROL, USER_DEFINED

if TYPE_CHECKING:
    from tokenizer_tools.load import TokenizerData

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class Dialogue:
    """The words for who speaks, the tokens `begin` and `end` around a picture ("": none, or written by who
    expands the prompt), and whether a picture stands on a line of its own. Without words a prompt is what
    was said, and no more.
    """

    user: str = "User"
    assistant: str = "Assistant"
    begin: str = ""
    end: str = ""
    own_line: bool = False


# llama.cpp knows the format, where it runs no jinja, by the line with 'Assistant: ' + ... + eos_token.
_TEMPLATE = """\
{%- macro written(content) -%}
{%- if content is string -%}{{ content | trim }}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'text' -%}
{%- set text = part['text'] -%}
{%- if loop.first -%}{%- set text = text.lstrip() -%}{%- endif -%}
{%- if loop.last -%}{%- set text = text.rstrip() -%}{%- endif -%}
{%- if not loop.first and content[loop.index0 - 1]['type'] == 'text' -%}{{ ' ' }}{%- endif -%}
{{ text }}
{%- elif part['type'] == 'media_marker' -%}{{ part['text'] }}
{%- elif part['type'] in ['image', 'image_url'] -%}{{ 'IMAGE' }}
{%- else -%}{{ raise_exception('content of type ' + part['type'] + ' is not supported') }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = written(messages[0]['content']) -%}
{%- else -%}
{%- set system = 'SYSTEM' -%}
{%- endif -%}
{%- if system -%}{{ system + '\\n\\n' }}{%- endif -%}
{%- for turn in messages -%}
{%- set message = {'role': turn['role'] | lower, 'content': written(turn['content'])} -%}
{%- if message['role'] == 'user' -%}
{{ 'User: ' + message['content'] }}
{%- if add_generation_prompt or not loop.last -%}{{ '\\n\\n' }}{%- endif -%}
{%- elif message['role'] == 'assistant' -%}
{%- if message['content'] -%}{{ 'Assistant: ' + message['content'] + eos_token }}
{%- else -%}{{ 'Assistant:' }}
{%- endif -%}
{%- elif not loop.first or message['role'] != 'system' -%}
{{ raise_exception('a message of role ' + message['role'] + ' cannot stand here') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""


# What was said, with no word more: llama.cpp itself ends a picture's line.
_PLAIN = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ['text', 'media_marker'] -%}{{ part['text'] }}
{%- elif part['type'] in ['image', 'image_url'] -%}{{ 'IMAGE' }}
{%- else -%}{{ raise_exception('content of type ' + part['type'] + ' is not supported') }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""
# Around a picture where the model has tokens for that. A server of llama.cpp gives a string with marks for
# pictures, <__media__> or with a word inside, and nothing between mark and text.
_FRAMED = """\
{%- macro framed(text) -%}
{%- set pieces = (text | replace('IMAGE', 'BEGIN' + 'IMAGE' + 'END')).split('<__media_') -%}
{%- for piece in pieces -%}
{%- if loop.first -%}{{ piece }}
{%- else -%}
{%- set word = piece.split('_>')[0] -%}
{%- set rest = piece[(word | length) + 2:] -%}
{%- set before = pieces[loop.index0 - 1].split('_>')[-1] -%}
{%- if before and not before.endswith('\\n') -%}{{ '\\n' }}{%- endif -%}
{{ 'BEGIN<__media_' + word + '_>END' }}
{%- if (rest or not loop.last) and not rest.startswith('\\n') -%}{{ '\\n' }}{%- endif -%}
{{ rest }}
{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
"""
_PICTURE = "{%- elif part['type'] in ['image', 'image_url'] -%}"
_ON_ITS_LINE = (
    "{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}{{ 'IMAGE' }}"
    "{%- if not loop.last -%}{{ '\\n' }}{%- endif -%}"
)


def vision_template(image_token: str, dialogue: Dialogue = Dialogue()) -> str:
    """The template's text; `image_token` stands where a picture's embeddings go, once for each picture."""
    text = _TEMPLATE if dialogue.user else _PLAIN
    if dialogue.own_line:
        text = text.replace(f"{_PICTURE}{{{{ 'IMAGE' }}}}", _PICTURE + _ON_ITS_LINE)
    if dialogue.begin:
        text = _FRAMED + text.replace("written(turn['content'])", "framed(written(turn['content']))")
    words = {"IMAGE": image_token, "BEGIN": dialogue.begin, "END": dialogue.end, "SYSTEM": SYSTEM}
    for word, meant in words.items():
        quoted = meant.replace("\\", "\\\\").replace("'", "\\'")
        text = text.replace(f"'{word}'", f"'{quoted}'").replace(f"'{word}<", f"'{quoted}<")
        text = text.replace(f"_>{word}'", f"_>{quoted}'")
    for role, word in (("User", dialogue.user), ("Assistant", dialogue.assistant)):
        text = text.replace(f"'{role}:", f"'{word}:")
    return text.rstrip("\n")


def question(text: str, image_token: str, dialogue: Dialogue) -> str:
    """The prompt that asks `text` about one picture, as the models' own code writes it."""
    if not dialogue.user:
        return f"{image_token}\n{text}"
    picture = f"{dialogue.begin}{image_token}{dialogue.end}" + ("\n" if dialogue.own_line else "")
    return f"{SYSTEM}\n\n{dialogue.user}: {picture}{text}\n\n{dialogue.assistant}:"


def check_around(tokenizer: TokenizerData, around: tuple[str, str], folder: Path) -> None:
    """Raise CheckpointError unless what stands before and after a picture are tokens of the tokenizer."""
    for text in filter(None, around):
        if text not in tokenizer.tokens:
            raise CheckpointError(
                "a token beside pictures is not known",
                where=folder,
                why=f"{text[:60]!r} stands there in a prompt, and the tokenizer has no such token",
                hint="Fetch the tokenizer and the processor files of the same model again",
            )


def image_token(tokenizer: TokenizerData, text: str, stated: object, folder: Path) -> tuple[str, int]:
    """The text and id of the token that stands for a picture: a special one, on which all files agree.

    `text` is what processor_config.json names, "" for nothing, `stated` the id in config.json or None.
    Raises CheckpointError.
    """
    whole = (CONTROL, USER_DEFINED)  # types of tokens that text never falls apart into
    known = {token: i for i, token in enumerate(tokenizer.tokens) if tokenizer.types[i] in whole}
    if text and text not in known:
        why = f"processor_config.json names {text[:60]!r}, which is not a special token of the tokenizer"
    elif not text and stated not in known.values():
        why = f"config.json gives the id {stated!r}, which is not a special token of the tokenizer"
    elif text and stated is not None and stated != known[text]:
        why = f"{text[:60]!r} is token {known[text]}, config.json says {stated!r}"
    else:
        token_id = known[text] if text else stated
        assert isinstance(token_id, int)
        return tokenizer.tokens[token_id], token_id
    raise CheckpointError(
        "the token for pictures is not known",
        where=folder,
        why=why,
        hint="Fetch the tokenizer and the processor files of the same model again",
    )
