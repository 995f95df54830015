"""The class that a config.json stands for, by transformers' own rule: the model type decides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsconvert.models.architecture import Architecture
from dsconvert.models.architectures import ARCHITECTURES

# By the model type for which transformers' AutoModel takes them.
BY_TYPE: dict[str, Architecture] = {found.model_type: found for found in ARCHITECTURES.values()}


@dataclass(frozen=True)
class ModelClass:
    """The class of a model.

    `name` is "" where the config names none, and the config's own word where no class here is meant.
    """

    name: str
    notes: tuple[str, ...] = ()


def model_class(raw: Mapping[str, Any]) -> ModelClass:
    """The class that `raw`, a config.json, stands for; never raises."""
    listed, kind = raw.get("architectures"), raw.get("model_type")
    names = [n for n in listed if isinstance(n, str)] if isinstance(listed, list) else []
    by_type = BY_TYPE.get(kind) if isinstance(kind, str) else None
    found = _named(names, by_type, "auto_map" in raw)
    if found not in ARCHITECTURES or names == [found] or listed is None:
        return ModelClass(found)
    return ModelClass(found, (f"config.json names the architectures {str(listed)[:80]!r}; read as {found}",))


def _named(names: list[str], by_type: Architecture | None, own_code: bool) -> str:
    """The class with a table, else the single name, else ""."""
    typed = by_type.hf_class if by_type else ""
    known = [ARCHITECTURES[name] for name in names if name in ARCHITECTURES]
    if not names:
        return typed
    if len(known) == 1 and (len(names) == 1 or known[0] is by_type):
        return typed if _both_plain(known[0], by_type) else known[0].hf_class
    if len(names) > 1 or own_code:
        return names[0] if len(names) == 1 else ""
    return _by_word(names[0], by_type) or names[0]


def _by_word(name: str, by_type: Architecture | None) -> str:
    """The class that is meant by another name for it, "" for none."""
    for meant in ARCHITECTURES.values():
        if meant.words and re.fullmatch(meant.words, name, re.IGNORECASE):
            if by_type is not None and _both_plain(meant, by_type):
                return by_type.hf_class
            return meant.hf_class if by_type in (None, meant) or meant.mount else ""
    return ""


def _both_plain(named: Architecture, by_type: Architecture | None) -> bool:
    """Whether both are decoders of no bigger model, of which the model type is taken."""
    return by_type is not None and not named.mount and not by_type.mount


def default_of(raw: Mapping[str, Any], key: str) -> Any:
    """What the class of a config, or of a decoder's part of one, takes for an absent key.

    Original DeepSeek-VL files name no class inside; that which such parts have counts then.
    """
    found = ARCHITECTURES.get(model_class(raw).name)
    inner = next(a.decoder for a in ARCHITECTURES.values() if a.mount and a.mount.nameless)
    return (found.decoder if found else inner).defaults[key]
