"""The keys of a GGUF language model: architecture, sizes and provenance."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import dsconvert
from converters.gguf.layout import KeyValues
from converters.gguf.rope import scaling_keys
from dsconvert.models.architecture import Architecture
from dsconvert.models.config import ModelConfig
from dsconvert.models.provenance import origin
from dsconvert.reading import read_head

# A size in a model's name: "7b", "1.3B", "135M", also between separators.
SIZE_IN_NAME = re.compile(r"\d+(?:\.\d+)?[bBmM]")
CARD = 64 << 10  # bytes in which the front matter ends; its parser takes 1 s for as many
HUB = "https://huggingface.co"
NULLS = ("", "~", "null", "Null", "NULL")  # YAML's
VERSION_IN_NAME = re.compile(r"v\d+(?:\.\d+)*", re.IGNORECASE)


def model_keys(config: ModelConfig, architecture: Architecture) -> dict[str, tuple[str, Any]]:
    """The numbers of the decoder, after the architecture's own name. Source: llama.cpp's keys for it."""
    keys = {**architecture.gguf_keys(config), **scaling_keys(config, architecture)}
    return {f"{architecture.gguf}.{key}": value for key, value in keys.items()}


def general_keys(
    folder: Path, config: ModelConfig, arch: str, parameters: int, experts: int = 0
) -> dict[str, tuple[str, Any]]:
    """`general.*` without the file type: name, size and origin as far as config, folder and card say.

    `parameters` are those of the model with one of its `experts`.
    """
    organization, name = origin(folder, config)
    keys: dict[str, tuple[str, Any]] = {
        "general.architecture": ("string", arch),
        "general.type": ("string", "model"),
        "general.name": ("string", name.replace("-", " ").strip() or name),
        "general.basename": ("string", basename(name)),
        "general.size_label": ("string", f"{experts}x" * bool(experts) + size_label(parameters)),
        "general.quantization_version": ("uint32", 2),
    }
    if organization:
        keys["general.organization"] = ("string", organization)
        keys["general.source.repo_url"] = ("string", f"{HUB}/{organization}/{name}")
    keys |= _card_keys(model_card(folder))
    keys["dsconvert.version"] = ("string", dsconvert.__version__)
    return keys


def size_label(parameters: int) -> str:
    """The usual short form of a parameter count: 134515008 -> "135M", 6910365696 -> "6.9B"."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if parameters >= scale * 0.9995:
            value = parameters / scale
            return f"{value:.0f}{suffix}" if value >= 99.95 or value % 1 < 0.05 else f"{value:.1f}{suffix}"
    return f"{parameters / 1e3:.0f}K"


def basename(name: str) -> str:
    """A model's name without its size, version and finetune: "deepseek-llm-7b-chat" -> "deepseek-llm"."""
    parts = re.split(r"[-_ ]", name)
    for at, part in enumerate(parts):
        if at and (SIZE_IN_NAME.fullmatch(part) or VERSION_IN_NAME.fullmatch(part)):
            return "-".join(parts[:at])
    return "-".join(parts)


def model_card(folder: Path) -> dict[str, Any]:
    """The front matter of README.md, every value as it is written: the language `no` stays `no`.

    Empty when there is none or it cannot be read (a card does not matter to the weights).
    """
    try:
        text = read_head(folder / "README.md", CARD).decode("utf-8-sig", errors="replace")
    except OSError:
        return {}
    parts = text.split("---", 2)
    if parts[0] or len(parts) < 3:
        return {}
    import yaml

    try:
        card = yaml.load(parts[1], Loader=yaml.BaseLoader)
    except Exception:  # of any kind: yaml raises what Python's types raise on odd values
        return {}
    return card if isinstance(card, dict) else {}


def _card_keys(card: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    keys: dict[str, tuple[str, Any]] = {}
    for field, key in (
        ("license", "license"),
        ("license_name", "license.name"),
        ("license_link", "license.link"),
    ):
        if value := _scalars(card.get(field)):
            keys[f"general.{key}"] = ("string", value[0])
    for field, key in (("tags", "tags"), ("language", "languages")):
        if values := _scalars(card.get(field)):
            keys[f"general.{key}"] = ("array:string", values)
    if bases := _scalars(card.get("base_model")):
        keys |= _base_keys(bases)
    return keys


def _scalars(value: object) -> list[str]:
    """A card's value, or the values of its list, that are words; nulls, lists and objects are none."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str) and item not in NULLS]


def _base_keys(bases: list[str]) -> dict[str, tuple[str, Any]]:
    keys: dict[str, tuple[str, Any]] = {"general.base_model.count": ("uint32", len(bases))}
    for number, base in enumerate(bases):
        organization, _, name = base.rpartition("/")
        keys[f"general.base_model.{number}.name"] = ("string", name.replace("-", " "))
        if organization:
            keys[f"general.base_model.{number}.organization"] = ("string", organization)
        keys[f"general.base_model.{number}.repo_url"] = ("string", f"{HUB}/{base}")
    return keys


def with_file_type(keys: KeyValues, file_type: int) -> dict[str, tuple[str, Any]]:
    """The keys with `general.file_type` right after the architecture, where readers look first."""
    result: dict[str, tuple[str, Any]] = {}
    for key, value in keys.items():
        result[key] = value
        if key == "general.architecture":
            result["general.file_type"] = ("uint32", file_type)
    return result
