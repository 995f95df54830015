"""A chat template for DeepSeek-VL that servers can use: content as a string, or as parts with pictures.

The model's own prompt is the conversation format "deepseek" of deepseek_vl/utils/conversation.py with the
system text of its processor; transformers' template for it takes parts only and fails on strings, which
llama.cpp's server sends. This one renders the same text on plain dialogues. It writes no BOS: the tokenizer
adds it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dsconvert.errors import CheckpointError
from tokenizer_tools.vocabulary import CONTROL

if TYPE_CHECKING:
    from tokenizer_tools.load import TokenizerData

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language."
)

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


def vision_template(image_token: str) -> str:
    """The template's text; `image_token` stands where a picture's embeddings go, once for each picture."""
    quoted = image_token.replace("\\", "\\\\").replace("'", "\\'")
    return _TEMPLATE.replace("'IMAGE'", f"'{quoted}'").replace("'SYSTEM'", f"'{SYSTEM}'").rstrip("\n")


def image_token(tokenizer: TokenizerData, text: str, stated: object, folder: Path) -> tuple[str, int]:
    """The text and id of the token that stands for a picture: a special one, on which all files agree.

    `text` is what processor_config.json names, "" for nothing, `stated` the id in config.json or None.
    Raises CheckpointError.
    """
    known = {token: i for i, token in enumerate(tokenizer.tokens) if tokenizer.types[i] == CONTROL}
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
