"""Makes small byte-level BPE tokenizers under any pre-tokenizer steps, and the folders that hold them."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizer_tools.library import splitter
from tokenizer_tools.samples import PROBES
from tokenizer_tools.special import byte_alphabet
from tokenizer_tools.steps import PreTokenizer, Step, to_json

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
GPT2_STEPS = PreTokenizer(
    (
        Step(
            "bytelevel",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
            "isolated",
        ),
    )
)


@cache
def _trained(spec: PreTokenizer, size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter(spec)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [char for byte, char in sorted(byte_alphabet().items())]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    # The probes alone, so that merges grow as far as the steps let them.
    tokenizer.train_from_iterator(PROBES * 8, trainer)
    return str(tokenizer.to_str())


def tokenizer_json(
    spec: PreTokenizer = GPT2_STEPS, *, size: int = 2500, ignore_merges: bool = False
) -> dict[str, Any]:
    """A tokenizer.json: trained under the steps, with <s>, </s> and <pad> as special tokens at its end."""
    raw: dict[str, Any] = copy.deepcopy(json.loads(_trained(spec, size)))
    raw["pre_tokenizer"] = to_json(spec)
    raw["model"]["ignore_merges"] = ignore_merges
    first = len(raw["model"]["vocab"])
    raw["added_tokens"] = [added(first + n, token) for n, token in enumerate((BOS, EOS, PAD))]
    return raw


def added(i: int, content: str, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    """An entry of added_tokens."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, "special": special, **plain, **flags}


def add_unreachable(raw: dict[str, Any], token: str) -> None:
    """Puts a token that no merge makes into the model, before the added tokens."""
    raw["model"]["vocab"][token] = len(raw["model"]["vocab"])
    for entry in raw["added_tokens"]:
        entry["id"] += 1


def rows(raw: dict[str, Any]) -> int:
    """How many ids the tokenizer has."""
    return len(raw["model"]["vocab"]) + len(raw["added_tokens"])


def write(folder: Path, raw: dict[str, Any], config: dict[str, Any] | None = None, /, **files: Any) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and `files` (name without .json -> object); the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is None:
        config = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "add_bos_token": True}
    for name, value in {"tokenizer": raw, "tokenizer_config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value), "utf-8")
    return folder
