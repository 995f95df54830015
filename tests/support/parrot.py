"""A checkpoint that says one sentence after any prompt, and then a token that only generation_config names.

Its blocks add nothing, its embedding is the identity, its head maps each token to the next of the sentence.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from added_tokens import change
from tokenizers import Tokenizer

ANSWER = "Yes, it is caf\u00e9 \u4f60."
NEVER = "never"
TURN, TURN_ID = "<|turn|>", 511
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:"
SIZES = tiny.Tiny(layers=1, d=512, ff=64, heads=8, kv_heads=2, vocab=512, dtype="f32")


def parrot(folder: Path, template: str = TEMPLATE) -> Path:
    """Write the checkpoint into `folder`."""
    tiny.tiny_checkpoint(folder, SIZES)
    added = {"id": TURN_ID, "content": TURN, "single_word": False, "lstrip": False, "rstrip": False}
    change(
        folder / "tokenizer.json",
        added_tokens=[*_added(folder), {**added, "normalized": False, "special": True}],
    )
    if template:
        change(folder / "tokenizer_config.json", chat_template=template)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos = tokenizer.token_to_id(tiny.EOS)
    change(folder / "generation_config.json", eos_token_id=[eos, TURN_ID])
    (colon,) = tokenizer.encode(":", add_special_tokens=False).ids
    chain = [colon, *tokenizer.encode(ANSWER, add_special_tokens=False).ids, TURN_ID]
    chain += tokenizer.encode(NEVER, add_special_tokens=False).ids
    assert len(set(chain)) == len(chain)
    tensors = tiny.tiny_tensors(SIZES)
    for name, value in tensors.items():
        if "norm" in name:
            value[:] = 1
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            value[:] = 0
    tensors["model.embed_tokens.weight"] = np.eye(SIZES.vocab, dtype=np.float32)
    head = np.zeros((SIZES.vocab, SIZES.d), np.float32)
    for token, following in pairwise(chain):
        head[following, token] = 1
    tensors["lm_head.weight"] = head
    tiny.write_weights(folder, {name: tiny.encode(value, "f32") for name, value in tensors.items()}, SIZES)
    return folder


def _added(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    return found
