"""The class that a config.json stands for, by transformers' own rule: the model type decides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LLAMA, MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"
# The classes with a table, by the model type for which transformers' AutoModel takes them.
BY_TYPE = {
    "llama": LLAMA,
    "mistral": LLAMA,  # the same layout, where no sliding window is used
    "deepseek_vl": "DeepseekVLForConditionalGeneration",
    "deepseek_vl_hybrid": "DeepseekVLHybridForConditionalGeneration",
    "multi_modality": "MultiModalityCausalLM",
}
INNER = {f"{stem}Model": f"{stem}ForConditionalGeneration" for stem in ("DeepseekVL", "DeepseekVLHybrid")}
# LLaMAForCausalLM, FSDPLlamaForCausalLM, LlamaModel and the like: wrappers' and old converters' words.
LLAMA_LIKE = re.compile(r"\w*(llama|mistral)(ForCausalLM|Model|LMHeadModel)", re.IGNORECASE)
# What MistralConfig takes for absent keys where LlamaConfig takes another value, and what it has not.
MISTRAL_DEFAULTS = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
MISTRAL_LACKS = {"attention_bias": False, "mlp_bias": False}


@dataclass(frozen=True)
class ModelClass:
    """The class of a model: the one whose table fits, and the one that a config.json should name.

    `name` is "" where the config names none, and the config's own word where no class here is meant.
    """

    name: str
    written: str
    mistral: bool = False
    notes: tuple[str, ...] = ()


def model_class(raw: Mapping[str, Any]) -> ModelClass:
    """The class that `raw`, a config.json, stands for; never raises."""
    listed, kind = raw.get("architectures"), raw.get("model_type")
    names = [n for n in listed if isinstance(n, str)] if isinstance(listed, list) else []
    by_type = BY_TYPE.get(kind) if isinstance(kind, str) else None
    mistral = kind == "mistral" or (kind is None and names[:1] == [MISTRAL])
    found = _named(names, by_type, "auto_map" in raw)
    if found not in BY_TYPE.values():
        return ModelClass(found, found)
    written = MISTRAL if mistral else found
    notes: tuple[str, ...] = ()
    if names != [found] and listed is not None and names != [written]:
        notes = (f"config.json names the architectures {str(listed)[:80]!r}; read as {written}",)
    return ModelClass(found, written, mistral, notes)


def _named(names: list[str], by_type: str | None, own_code: bool) -> str:
    """The class with a table, else the single name, else ""."""
    known = [name for name in names if name in BY_TYPE.values()]
    if len(known) == 1 and (len(names) == 1 or known[0] == by_type):
        return known[0]
    if not names:
        return by_type or ""
    if len(names) > 1:
        return ""
    if own_code:
        return names[0]
    if names[0] in INNER:
        return INNER[names[0]]
    return LLAMA if LLAMA_LIKE.fullmatch(names[0]) and by_type in (LLAMA, None) else names[0]


def mistral_as_llama(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A Mistral config as the Llama config that says the same, its sliding window still in it."""
    stated = {key: value for key, value in raw.items() if value is not None or key == "sliding_window"}
    return {**MISTRAL_DEFAULTS, **stated, **MISTRAL_LACKS, "model_type": "llama"}
