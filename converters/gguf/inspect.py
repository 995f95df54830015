"""What `dsconvert inspect` reports of a GGUF file, and whether two files belong together."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from converters.gguf.parse import GGUFFile
from converters.gguf.projector.completeness import completeness, is_known, pair_faults
from converters.gguf.projector.keys import is_projector
from dsconvert.events import Check

LONG = 8  # items of an array that are shown


def summary(file: GGUFFile) -> dict[str, Any]:
    """The file as plain data: sizes, keys (long arrays shortened), types, tensors, tokenizer, pairing id.

    >>> from pathlib import Path
    >>> from converters.gguf.convert import convert
    >>> from converters.gguf.output import Options
    >>> from converters.gguf.parse import open_gguf
    >>> events = list(convert(Options("sample:", ("q6_k",), Path("sample-q6_k.gguf"), effort="off")))
    >>> sorted(summary(open_gguf(Path("sample-q6_k.gguf")))["types"])
    ['f32', 'q6_k']
    """
    types: dict[str, dict[str, int]] = {}
    for tensor in file.tensors.values():
        entry = types.setdefault(tensor.qtype.name, {"tensors": 0, "weights": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["weights"] += tensor.values
        entry["bytes"] += tensor.nbytes
    weights = sum(entry["weights"] for entry in types.values())
    data = sum(entry["bytes"] for entry in types.values())
    return {
        "files": [str(path) for path in file.paths],
        "bytes": file.nbytes,
        "version": file.version,
        "weights": weights,
        "bits_per_weight": round(8 * data / weights, 4) if weights else 0.0,
        "pairing_id": file.keys.get("dsconvert.pairing_id"),
        "types": types,
        "keys": {key: shorten(value) for key, value in file.keys.items()},
        "pre_tokenizer": pre_tokenizer(file.keys),
        "tensors": [
            {
                "name": t.name,
                "shape": list(t.shape),
                "type": t.qtype.name,
                "bytes": t.nbytes,
                "bits_per_weight": round(8 * t.nbytes / t.values, 4) if t.values else 0.0,
            }
            for t in file.tensors.values()
        ],
    }


def judge(files: Sequence[GGUFFile]) -> Iterator[Check]:
    """What is wrong: with each projector on its own, with a model and a projector as a pair."""
    for file in files:
        if is_known(file):
            yield from completeness(file)
    if len(files) == 2 and any(map(is_projector, files)):
        faults = pair_faults(files[0], files[1])
        yield Check("pair", not faults, "not a pair, because " + "; ".join(faults) if faults else "pair")


def shorten(value: Any) -> Any:
    """A key's value; of a long array the first items and the count."""
    if isinstance(value, list | array) and len(value) > LONG:
        return {"count": len(value), "first": list(value[:LONG])}
    return value


def pre_tokenizer(keys: dict[str, Any]) -> dict[str, Any] | None:
    """The tokenizer's regex spec step by step, as the file carries it; None when it carries none."""
    prefix = "dsconvert.pre_tokenizer."
    steps = keys.get(prefix + "type")
    columns = {name: keys.get(prefix + name, []) for name in ("type", "regex", "behavior", "invert")}
    if not steps or not all(isinstance(column, list) for column in columns.values()):
        return None
    return {
        "runtime": keys.get("tokenizer.ggml.pre"),
        "flavor": keys.get(prefix + "flavor"),
        "sha256": keys.get(prefix + "sha256"),
        "steps": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=False)],
    }
