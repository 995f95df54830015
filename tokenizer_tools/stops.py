"""Which tokens end a generation, from every file that says so, and the GGUF keys that carry them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizer_tools import chat_template
from tokenizer_tools.chat_template import ChatTemplates
from tokenizer_tools.library import read_object
from tokenizer_tools.rendering import Unrendered

CONFIGS = ("generation_config.json", "config.json")
# Texts at which llama.cpp ends a generation whatever the keys say (src/llama-vocab.cpp, special_eog_ids).
_ENDS = """
<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> <|eom_id|> <EOT> _<EOT>
<|end_of_text|> <end_of_utterance>
"""
ENDS_BY_NAME = frozenset(_ENDS.split())
# Besides EOS itself: the two ids of which llama.cpp makes ends of a generation.
STOP_KEYS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
ANSWER = "A test."
TURN = ({"role": "user", "content": "Hello, who are you?"}, {"role": "assistant", "content": ANSWER})


def stated_stops(folder: Path) -> dict[int, str]:
    """Every id that generation_config.json or config.json gives as eos_token_id, with the file that does."""
    found: dict[int, str] = {}
    for name in CONFIGS:
        value = read_object(folder / name).get("eos_token_id")
        for i in value if isinstance(value, list) else [value]:
            if type(i) is int:
                found.setdefault(i, name)
    return found


def stop_ids(
    folder: Path, eos: int | None, added: Mapping[int, str], template: str, names: Mapping[str, str]
) -> tuple[tuple[int, ...], list[str]]:
    """The ids that end a generation, EOS first, and notes.

    `added` is the text of every added token by id: an id of a config counts only where it is one of them,
    since configs carry ids of other vocabularies by default. The token with which the chat template
    `template` ends an answer counts too; `names` are its variables bos_token and eos_token.
    """
    stated = stated_stops(folder)
    found = [i for i in stated if i in added]
    turn = turn_end(template, added, names)
    if turn is not None:
        found.insert(0, turn)
    stops = tuple(dict.fromkeys([*([] if eos is None else [eos]), *found]))
    more = [f"{added[i][:40]!r} ({i}, {stated.get(i, 'chat template')})" for i in stops if i != eos]
    notes = []
    if more and eos is not None:
        notes.append(f"besides EOS ({eos}) these tokens end a generation: {', '.join(more)}")
    return stops, notes


def turn_end(template: str, added: Mapping[int, str], names: Mapping[str, str]) -> int | None:
    """The id of the added token with which a template ends an answer; None where there is none."""
    if not template or chat_template.check(ChatTemplates(template), **names):
        return None  # one that renders no plain dialogue has been reported, and is not tried again
    try:
        text = chat_template.render(template, TURN, **names, add_generation_prompt=False)
    except Unrendered:
        return None
    _, found, after = text.rpartition(ANSWER)
    rest = after.lstrip()
    fitting = [i for i, content in added.items() if rest.startswith(content)] if found else []
    return max(fitting, key=lambda i: len(added[i]), default=None)


def stop_keys(tokens: Sequence[str], stops: Sequence[int], eos: int | None) -> dict[str, int]:
    """The keys that make llama.cpp end a generation at `stops` besides EOS; tokens it knows come last."""
    others = sorted((i for i in dict.fromkeys(stops) if i != eos), key=lambda i: tokens[i] in ENDS_BY_NAME)
    return dict(zip(STOP_KEYS, others, strict=False))


def carried_stops(tokens: Sequence[str], stops: Sequence[int], eos: int | None) -> frozenset[int]:
    """Those of `stops` at which llama.cpp ends a generation, by EOS, by `stop_keys` or by name."""
    keyed = {eos, *stop_keys(tokens, stops, eos).values()}
    return frozenset(i for i in stops if i in keyed or tokens[i] in ENDS_BY_NAME)


def lost_stops(tokens: Sequence[str], stops: Sequence[int], eos: int | None) -> list[str]:
    """A note that names the stops for which there is no key and no name that llama.cpp knows."""
    carried = carried_stops(tokens, stops, eos)
    lost = [f"{tokens[i][:40]!r} ({i})" for i in stops if i not in carried]
    if not lost:
        return []
    return [f"no GGUF key is left for {', '.join(lost)}: llama.cpp does not end a generation there"]
