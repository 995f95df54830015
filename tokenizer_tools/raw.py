"""Reads added tokens and end ids from a checkpoint folder's files a second time, on its own, for proofs.

`load` and `added` turn a folder into a tokenizer; a token that they lose is missing on both sides of a
comparison with what was made of it. So a proof takes the tokens from here, straight from the files.
"""

from __future__ import annotations

import os
from pathlib import Path

from tokenizer_tools.library import parse_object, read_object, read_text


def added_ids(folder: Path, rows: int) -> dict[str, int]:
    """The text and the id of every added token with an embedding row, as transformers returns them.

    From tokenizer.json, then from added_tokens_decoder of tokenizer_config.json or, without that key, from
    added_tokens.json. Of two ids for a text, and of two texts for an id, the first counts.
    """
    path = folder / "tokenizer.json"
    entries = (parse_object(read_text(path), path) if os.path.isfile(path) else {}).get("added_tokens") or []
    pairs = [(entry["content"], entry["id"]) for entry in entries]
    config = read_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        decoder = config["added_tokens_decoder"] or {}
        pairs += sorted(((entry["content"], int(i)) for i, entry in decoder.items()), key=lambda p: p[1])
    else:
        pairs += sorted(read_object(folder / "added_tokens.json").items(), key=lambda pair: pair[1])
    found: dict[str, int] = {}
    taken = set[int]()
    for content, i in pairs:
        if i < rows and content not in found and i not in taken:
            found[content] = i
            taken.add(i)
    return found


def end_ids(folder: Path, added: dict[str, int]) -> frozenset[int]:
    """The ids that generation_config.json and config.json give as eos_token_id and that are added tokens."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_object(folder / name).get("eos_token_id")
        found |= {i for i in (value if isinstance(value, list) else [value]) if type(i) is int}
    return frozenset(found & set(added.values()))
