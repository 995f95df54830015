"""The pre-tokenizer of a byte-level BPE: an ordered list of steps, its fingerprint, its place in a GGUF.

Each step splits the pieces of the step before it again. The GGUF form, one array element per step:

    type      split     regex = the pattern          behavior, invert as in tokenizer.json
              digits    regex empty                  behavior isolated (each digit) or contiguous (runs)
              bytelevel regex = GPT-2's own pattern where the step splits by it, else empty
              bytelevel_prefix_space                 the same, and a space goes before a piece without one

so that a reader that does not know a type refuses it, and whoever has a regex engine needs no table of
names. The fingerprint is the SHA-256 of the same arrays as canonical JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsconvert.errors import TokenizerError

PREFIX = "dsconvert.pre_tokenizer."
FLAVOR = "oniguruma"
# What ByteLevel(use_regex=true) splits by: GPT-2's encoder.py, as `tokenizers` compiles it.
GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BEHAVIORS = {
    "Isolated": "isolated",
    "Removed": "removed",
    "MergedWithPrevious": "merged_with_previous",
    "MergedWithNext": "merged_with_next",
    "Contiguous": "contiguous",
}
BYTE_LEVEL = ("bytelevel", "bytelevel_prefix_space")
MAX_DEPTH = 16
REGEX_META = frozenset("\\.+*?()|[]{}^$#&-~")

Value = tuple[str, Any]


@dataclass(frozen=True)
class Step:
    """One step; `type` is split, digits, bytelevel or bytelevel_prefix_space (see the module's head)."""

    type: str
    regex: str = ""
    behavior: str = ""
    invert: bool = False


@dataclass(frozen=True)
class PreTokenizer:
    """The steps in order."""

    steps: tuple[Step, ...]

    @property
    def canonical(self) -> str:
        """The canonical JSON: sorted keys, no spaces, ASCII only."""
        return json.dumps({**_columns(self), "flavor": FLAVOR}, sort_keys=True, separators=(",", ":"))

    @property
    def sha256(self) -> str:
        """The fingerprint: hexadecimal SHA-256 of `canonical`."""
        return hashlib.sha256(self.canonical.encode("ascii")).hexdigest()

    @property
    def split_sha256(self) -> str:
        """SHA-256 of the Split patterns alone, one after the other: the digest that ollama knows them by."""
        patterns = "".join(step.regex for step in self.steps if step.type == "split")
        return hashlib.sha256(patterns.encode("utf-8")).hexdigest()


def _columns(spec: PreTokenizer) -> dict[str, list[Any]]:
    return {
        "type": [step.type for step in spec.steps],
        "regex": [step.regex for step in spec.steps],
        "behavior": [step.behavior for step in spec.steps],
        "invert": [step.invert for step in spec.steps],
    }


def extract(raw: object, where: object = "tokenizer.json") -> PreTokenizer:
    """The steps of the `pre_tokenizer` object of a tokenizer.json, sequences flattened.

    Raises TokenizerError for a step that the spec cannot state, naming it, and when there is not exactly
    one ByteLevel step.

    >>> extract({"type": "ByteLevel", "add_prefix_space": False, "use_regex": False})
    PreTokenizer(steps=(Step(type='bytelevel', regex='', behavior='', invert=False),))
    """
    spec = PreTokenizer(tuple(_steps(raw, where, 0)))
    byte_level = [step for step in spec.steps if step.type in BYTE_LEVEL]
    if len(byte_level) != 1:
        raise TokenizerError(
            f"the pre-tokenizer has {len(byte_level)} ByteLevel steps, a byte-level BPE has one",
            where=where,
            hint="Only byte-level BPE tokenizers can be carried",
        )
    return spec


def _steps(raw: object, where: object, depth: int) -> list[Step]:
    if not isinstance(raw, Mapping) or depth > MAX_DEPTH:
        raise TokenizerError("has no readable pre_tokenizer", where=where, hint="Fetch the file again")
    kind = raw.get("type")
    if kind == "Sequence":
        inner = raw.get("pretokenizers")
        if not isinstance(inner, list):
            raise TokenizerError("has a pre_tokenizer Sequence without a list", where=where)
        return [step for item in inner for step in _steps(item, where, depth + 1)]
    if kind == "Split":
        return [_split(raw, where)]
    if kind == "Digits":
        return [Step("digits", behavior="isolated" if raw.get("individual_digits") else "contiguous")]
    if kind == "ByteLevel":
        return [_byte_level(bool(raw.get("add_prefix_space")), bool(raw.get("use_regex", True)))]
    raise TokenizerError(
        f"the pre-tokenizer step {str(kind)[:80]!r} cannot be stated in a GGUF file",
        where=where,
        why="Split, Digits and ByteLevel can",
        hint="This tokenizer needs support of its own; please report it",
    )


def _split(raw: Mapping[str, Any], where: object) -> Step:
    pattern, behavior = raw.get("pattern"), BEHAVIORS.get(str(raw.get("behavior")))
    if not isinstance(pattern, Mapping) or len(pattern) != 1 or behavior is None:
        raise TokenizerError("has a Split step without a pattern or a known behavior", where=where)
    ((kind, text),) = pattern.items()
    if kind not in ("Regex", "String") or not isinstance(text, str):
        raise TokenizerError("has a Split step whose pattern is neither Regex nor String", where=where)
    if kind == "String":
        text = "".join("\\" + c if c in REGEX_META else c for c in text)
    return Step("split", text, behavior, bool(raw.get("invert", False)))


def _byte_level(prefix_space: bool, use_regex: bool) -> Step:
    return Step(
        "bytelevel_prefix_space" if prefix_space else "bytelevel",
        GPT2_REGEX if use_regex else "",
        "isolated" if use_regex else "",
    )


def to_json(spec: PreTokenizer) -> dict[str, Any]:
    """The `pre_tokenizer` object of a tokenizer.json with these steps.

    >>> to_json(PreTokenizer((Step("digits", behavior="isolated"),)))["pretokenizers"]
    [{'type': 'Digits', 'individual_digits': True}]
    """
    behaviors = {snake: camel for camel, snake in BEHAVIORS.items()}
    steps: list[dict[str, Any]] = []
    for step in spec.steps:
        if step.type == "split":
            pattern = {"Regex": step.regex}
            behavior = behaviors[step.behavior]
            steps.append({"type": "Split", "pattern": pattern, "behavior": behavior, "invert": step.invert})
        elif step.type == "digits":
            steps.append({"type": "Digits", "individual_digits": step.behavior == "isolated"})
        else:
            prefix = step.type == "bytelevel_prefix_space"
            flags = {"add_prefix_space": prefix, "trim_offsets": True, "use_regex": bool(step.regex)}
            steps.append({"type": "ByteLevel", **flags})
    return {"type": "Sequence", "pretokenizers": steps}


def to_gguf(spec: PreTokenizer) -> dict[str, Value]:
    """The spec's GGUF keys: name -> (value type, value).

    >>> to_gguf(PreTokenizer((Step("digits", behavior="isolated"),)))["dsconvert.pre_tokenizer.type"]
    ('array:string', ['digits'])
    """
    columns = _columns(spec)
    return {
        PREFIX + "type": ("array:string", columns["type"]),
        PREFIX + "regex": ("array:string", columns["regex"]),
        PREFIX + "behavior": ("array:string", columns["behavior"]),
        PREFIX + "invert": ("array:bool", columns["invert"]),
        PREFIX + "flavor": ("string", FLAVOR),
        PREFIX + "sha256": ("string", spec.sha256),
    }


def from_gguf(metadata: Mapping[str, Any], where: object = "") -> PreTokenizer | None:
    """The spec that GGUF metadata (key -> plain value) states, or None when it states none.

    Raises TokenizerError for a step that is not known here, by name, for a flavour other than
    oniguruma, and when the fingerprint does not fit.

    >>> spec = PreTokenizer((Step("digits", behavior="isolated"), Step("bytelevel")))
    >>> from_gguf({name: value for name, (_, value) in to_gguf(spec).items()}) == spec
    True
    """
    if PREFIX + "type" not in metadata:
        return None
    try:
        columns = [list(metadata[PREFIX + name]) for name in ("type", "regex", "behavior", "invert")]
        spec = PreTokenizer(
            tuple(
                Step(str(kind), str(regex), str(behavior), bool(invert))
                for kind, regex, behavior, invert in zip(*columns, strict=True)
            )
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"the {PREFIX}* keys do not fit together", where=where, why=str(error)) from None
    flavor = metadata.get(PREFIX + "flavor")
    if flavor != FLAVOR:
        raise TokenizerError(f"the regex flavour is {flavor!r}, {FLAVOR!r} is known here", where=where)
    for step in spec.steps:
        _check(step, where)
    if metadata.get(PREFIX + "sha256") != spec.sha256:
        raise TokenizerError(
            f"{PREFIX}sha256 is not the digest of the steps",
            where=where,
            hint="The metadata was changed after the conversion; convert again",
        )
    return spec


def _check(step: Step, where: object) -> None:
    """Refuses a step that `to_json` would not give back as it is stated."""
    allowed = {
        "split": step.behavior in BEHAVIORS.values(),
        "digits": not step.regex and not step.invert and step.behavior in ("isolated", "contiguous"),
    }
    byte_level = {(GPT2_REGEX, "isolated", False), ("", "", False)}
    if step.type in BYTE_LEVEL:
        allowed[step.type] = (step.regex, step.behavior, step.invert) in byte_level
    if not allowed.get(step.type, False):
        raise TokenizerError(
            f"the pre-tokenizer step {step.type!r} is not known here as it is stated",
            where=where,
            why=f"regex {step.regex[:80]!r}, behavior {step.behavior!r}, invert {step.invert}",
        )
