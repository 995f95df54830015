"""Makes small SentencePiece-like BPE tokenizers, as Llama 2's, and the GGUF files of such a vocabulary."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tiny_tokenizer import added

from tokenizer_tools.samples import PROBES, random_texts

SPACE = "\u2581"
RUNS = (2, 3, 4, 8)  # spaces that are one token
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
CONFIG = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "add_bos_token": True}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}
FORMS: dict[str, dict[str, Any]] = {
    "prepend": {"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, "pre_tokenizer": None},
    "never": {"normalizer": REPLACE, "pre_tokenizer": None},
} | {
    scheme: {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False
        },
    }
    for scheme in ("first", "always")
}  # fmt: skip


@cache
def _trained(size: int) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=200, show_progress=False)
    texts = [text for text in (*PROBES * 8, *random_texts(5, 300)) if "\x00" not in text]
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def tokenizer_json(form: str = "prepend", *, size: int = 1200) -> dict[str, Any]:
    """A tokenizer.json: <unk>, <s>, </s>, the 256 bytes, what was trained, and runs of spaces."""
    model = json.loads(_trained(size))["model"]
    runs = [SPACE * n for n in RUNS]
    splits = [[run[:at], run[at:]] for run in runs for at in range(1, len(run))]
    known = [pair for pair in splits if {*pair} <= {SPACE, *runs}]
    known.sort(key=lambda pair: (-len(pair[0]), -len(pair[1])))  # as transformers sorts equal scores
    return of_merges([*model["vocab"], *runs], [*model["merges"], *known], form)


def of_merges(tokens: list[str], merges: list[Any], form: str = "prepend") -> dict[str, Any]:
    """A tokenizer.json of tokens and merges."""
    vocab = [UNK, BOS, EOS, *(f"<0x{b:02X}>" for b in range(256)), *tokens]
    return copy.deepcopy(
        {
            "version": "1.0",
            "added_tokens": [added(i, content) for i, content in enumerate(vocab[:3])],
            **FORMS[form],
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "BPE",
                "unk_token": UNK,
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": {token: i for i, token in enumerate(vocab)},
                "merges": merges,
            },
        }
    )


def random_merges(seed: int, count: int = 14) -> dict[str, Any]:
    """A tokenizer.json whose merges are any pairs of tokens in any order, some tokens with more than one."""
    rng = random.Random(seed)
    tokens, merges = ["a", "b", "c", SPACE], []
    while len(merges) < count:
        pair = [rng.choice(tokens), rng.choice(tokens)]
        if len("".join(pair)) > 6 or pair in merges:
            continue
        merges.insert(rng.randint(max(len(merges) - 3, 0), len(merges)), pair)
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
    return of_merges(tokens, merges)


def write_vocabulary(path: Path, keys: Mapping[str, tuple[str, Any]]) -> Path:
    """A GGUF file of tokenizer keys (name -> type and value) alone, which llama.cpp loads without weights."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    kinds = {"string": writer.add_string, "bool": writer.add_bool, "uint32": writer.add_uint32}
    for name, (kind, value) in keys.items():
        if kind in kinds:
            kinds[kind](name, value)
        elif value:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
