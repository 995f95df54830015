"""BOS, EOS, PAD, UNK, and what is added around a text: read from all files that say something about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconvert.errors import TokenizerError
from tokenizer_tools.library import guarded, read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMES = ("bos", "eos", "pad", "unk")
# The classes whose transformers code adds BOS unless tokenizer_config.json says otherwise.
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
# The bytes that occur in UTF-8: all but C0, C1 and F5 to FF.
UTF8_BYTES = tuple(b for b in range(256) if b not in (0xC0, 0xC1) and b < 0xF5)


def byte_alphabet() -> dict[int, str]:
    """Byte -> the character that stands for it in a byte-level vocabulary (GPT-2's bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def special_ids(
    folder: Path,
    config: Mapping[str, Any],
    known: Mapping[str, int],
    control: Sequence[int],
) -> tuple[dict[str, int], list[str]]:
    """The ids of bos, eos, pad and unk, those that there are, and notes.

    `known` is token -> id, `control` the special added tokens' ids.
    tokenizer_config.json goes before special_tokens_map.json; only where both are silent does the id in
    generation_config.json or config.json count, and only if that token is a special one (Llama configs
    carry 1 and 2 by default). Raises TokenizerError when BOS or EOS names a token that does not exist.
    """
    mapped = read_object(folder / "special_tokens_map.json")
    configs = [read_object(folder / name) for name in ("generation_config.json", "config.json")]
    found: dict[str, int] = {}
    notes: list[str] = []
    for name in NAMES:
        key = f"{name}_token"
        file = next((f for f, data in _files(config, mapped) if key in data), None)
        if file is None:
            i = _from_ids([data.get(f"{name}_token_id") for data in configs], control)
            if i is not None:
                found[name] = i
            continue
        text = _content(dict(_files(config, mapped))[file][key], key, folder / file)
        if text is None:
            continue
        if text in known:
            found[name] = known[text]
        elif name in ("bos", "eos"):
            raise TokenizerError(
                f"names {text[:60]!r} as {key}, which the vocabulary does not have",
                where=folder / file,
                hint="The files are not of the same model; fetch both again",
            )
        else:
            notes.append(f"{file} names {text[:60]!r} as {key}, which the vocabulary does not have; left out")
    return found, notes


def _files(config: Mapping[str, Any], mapped: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [("tokenizer_config.json", config), ("special_tokens_map.json", mapped)]


def _content(value: object, key: str, where: Path) -> str | None:
    """The text of a token given as text, as an object with `content`, or as null."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is None or (isinstance(text, str) and text):
        return text
    raise TokenizerError(f"{key} is neither text nor null", where=where, hint="Fetch the file again")


def _from_ids(values: Sequence[object], control: Sequence[int]) -> int | None:
    for value in values:
        first = value[0] if isinstance(value, list) and value else value
        if type(first) is int and first in control:
            return first
    return None


def additions(
    library: Tokenizer,
    config: Mapping[str, Any],
    special: Mapping[str, int],
    path: Path,
    add_bos: bool | None = None,
) -> tuple[tuple[bool, bool], list[str]]:
    """Whether BOS goes before and EOS after a text, and notes.

    `add_bos` decides on BOS where it is given; else an explicit add_bos_token or add_eos_token in
    tokenizer_config.json does; a Llama class without one adds BOS; otherwise what the post-processor really
    does counts. Raises TokenizerError when it adds anything else (no GGUF key can say so), or when the token
    to add does not exist.
    """
    before, after = _around(library, path)
    llama = config.get("tokenizer_class") in LLAMA_CLASSES
    asked = {"bos": (before, llama and "bos" in special, add_bos), "eos": (after, False, None)}
    flags, notes = [], []
    for name, (measured, default, wanted) in asked.items():
        key = f"add_{name}_token"
        stated = _stated(config, key, special, path) if wanted is None else wanted
        if stated and name not in special:
            raise TokenizerError(
                f"--add-{name} asks for a {name.upper()} that the tokenizer does not have",
                where=path.with_name("tokenizer_config.json"),
                hint=f"Name the {name}_token there, or leave --add-{name} out",
            )
        if stated is None and measured and measured != [special.get(name)]:
            raise TokenizerError(
                f"the post-processor adds the tokens {measured[:8]}, a GGUF adds {name.upper()} only",
                where=path,
                hint=f"Set {key} in tokenizer_config.json to what the model needs",
            )
        if stated is False and measured and wanted is None:
            notes.append(f"{key} is false although the post-processor adds {name.upper()}; false wins")
        flags.append(bool(measured) or default if stated is None else stated)
    return (flags[0], flags[1]), notes


def _stated(config: Mapping[str, Any], key: str, special: Mapping[str, int], path: Path) -> bool | None:
    """What tokenizer_config.json says under `key`, or None where it says nothing."""
    where, name = path.with_name("tokenizer_config.json"), key.split("_")[1]
    stated = config.get(key)
    if stated is not None and not isinstance(stated, bool):
        raise TokenizerError(f"{key} is neither true nor false", where=where)
    if stated and name not in special:
        raise TokenizerError(
            f"{key} is true and there is no {name}_token",
            where=where,
            hint=f"Name the {name}_token there, or set {key} to false",
        )
    return stated


def lost_bos(config: Mapping[str, Any], bos: str, template: str) -> list[str]:
    """A note where nothing says that BOS goes before a text and the files look as if that had been lost.

    transformers 5 saves a tokenizer without add_bos_token. Its mark is the class TokenizersBackend, or the
    key `backend`; a chat template that begins with bos_token is a sign of its own.
    """
    if config.get("add_bos_token") is not None:
        return []
    saved = "backend" in config or config.get("tokenizer_class") == "TokenizersBackend"
    begins = re.match(r"\s*\{\{-?\s*bos_token\b", template) is not None
    if not saved and not begins:
        return []
    signs = ["transformers 5 saved it, which leaves add_bos_token out"] * saved
    signs += ["the chat template begins with bos_token"] * begins
    return [
        f"BOS ({bos[:40]!r}) does not go before a text, since tokenizer_config.json does not say "
        f"add_bos_token; {', and '.join(signs)}. If the model was trained with it, give --add-bos"
    ]


def _around(library: Tokenizer, path: Path) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text, measured."""
    with guarded("run the post-processor", path):
        encoding = library.encode("a", add_special_tokens=True)
        ids, mask = encoding.ids, encoding.special_tokens_mask
    first = mask.index(0) if 0 in mask else len(mask)
    last = len(mask) - mask[::-1].index(0) if 0 in mask else len(mask)
    return ids[:first], ids[last:]


def check_bytes(vocab: Mapping[str, int], unk: object, path: Path) -> list[str]:
    """A note where some byte of UTF-8 text has no token.

    Raises TokenizerError where the tokenizer would give its unknown token for them: runtimes drop the
    bytes instead, and ids would differ.
    """
    alphabet = byte_alphabet()
    missing = [b for b in UTF8_BYTES if alphabet[b] not in vocab]
    if not missing:
        return []
    listed = ", ".join(f"{b:02X}" for b in missing[:8]) + (" ..." if len(missing) > 8 else "")
    if unk is not None:
        raise TokenizerError(
            f"{len(missing)} bytes have no token ({listed}) and become the unknown token",
            where=path,
            why="A GGUF runtime drops such bytes, so ids would differ",
            hint="Train the tokenizer with the whole byte alphabet (pre_tokenizers.ByteLevel.alphabet())",
        )
    return [
        f"{len(missing)} bytes have no token ({listed}) and are lost from a text; the characters around them "
        "may merge in the source tokenizer and not in llama.cpp"
    ]


def normalizer(raw: object, path: Path) -> tuple[str, list[str]]:
    """ "" or "nfc"; raises TokenizerError for any other normalizer, naming it."""
    kinds = _normalizers(raw, 0)
    if not kinds:
        return "", []
    if set(kinds) == {"NFC"}:
        note = "the tokenizer normalises text to NFC, llama.cpp does not: ids differ on text that is not NFC"
        return "nfc", [note]
    raise TokenizerError(
        f"normalises text by {', '.join(kinds)[:120]}, which a GGUF file cannot state",
        where=path,
        hint="Only tokenizers without a normalizer, or with NFC, can be carried",
    )


def _normalizers(raw: object, depth: int) -> list[str]:
    if raw is None:
        return []
    if not isinstance(raw, dict) or depth > 16:
        return ["an unreadable normalizer"]
    if raw.get("type") == "Sequence":
        inner = raw.get("normalizers")
        steps = inner if isinstance(inner, list) else [inner]
        return [kind for step in steps for kind in _normalizers(step, depth + 1)]
    return [str(raw.get("type"))[:40]]
