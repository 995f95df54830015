"""What a model folder holds, of any format: the keys of its config.json, and its tensors to the byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from dsconvert.checkpoints.weight_files import open_weights
from dsconvert.errors import TokenizerError
from dsconvert.models.config import load_json
from dsconvert.proof.result import sizes_by_type
from dsconvert.proof.sources import Opened

MANY = 32  # keys of a nested object, or items of a list, that are shown one by one


def folder_summary(opened: Opened) -> dict[str, Any]:
    """A folder as plain data: sizes, the keys of config.json (long lists shortened), types, tensors.

    A quantized matrix is one tensor, of all the bytes that it is stored in. Raises what reading headers does.

    >>> from converters.outputs import open_output
    >>> from dsconvert.checkpoints.locate import locate
    >>> found = folder_summary(open_output(locate("sample:")))
    >>> found["kind"], found["weights"], found["bits_per_weight"], sorted(found["types"])
    ('checkpoint', 2622720, 16.0, ['bf16'])
    """
    tensors = list(_tensors(opened))
    sizes = sizes_by_type((t["type"], prod(t["shape"]), t["bytes"]) for t in tensors)
    weights, data = sum(one.weights for one in sizes), sum(one.nbytes for one in sizes)
    return {
        "files": [str(opened.path)],
        "kind": opened.kind,
        "quant": opened.quant,
        "bytes": opened.nbytes,
        "weights": weights,
        "bits_per_weight": round(8 * data / weights, 4) if weights else 0.0,
        "holds": opened.holds,
        "tokenizer": str(opened.text) if isinstance(opened.text, TokenizerError) else None,
        "types": {s.type: {"tensors": s.tensors, "weights": s.weights, "bytes": s.nbytes} for s in sizes},
        "keys": dict(flat(load_json(opened.path / "config.json"))),
        "tensors": tensors,
        "notes": [*opened.notes, *opened.strange],
    }


def _tensors(opened: Opened) -> Iterator[dict[str, Any]]:
    """Every tensor with its bytes and bits per weight, in the order of the files."""
    stored = open_weights(opened.path).tensors
    known = {name: (shape, kind) for name, shape, kind in opened.stored}
    nbytes: dict[str, int] = {}
    for name, tensor in stored.items():
        whole = f"{name.rpartition('.')[0]}.weight"
        owner = name if name in known or whole not in known else whole
        nbytes[owner] = nbytes.get(owner, 0) + tensor.nbytes
    for name, size in nbytes.items():
        plain = stored.get(name)
        shape, kind = known.get(name) or (plain.shape if plain is not None else (), None)
        if not isinstance(kind, str):  # EXL2's rows are of several widths
            kind = plain.dtype if plain is not None else opened.kind.lower()
        bits = round(8 * size / prod(shape), 4) if prod(shape) else 0.0
        yield {"name": name, "shape": list(shape), "type": kind, "bytes": size, "bits_per_weight": bits}


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of nested objects, each behind those that it is in; of big objects and lists their size.

    >>> dict(flat({"a": {"b": 1}, "c": [1] * 99}))
    {'a.b': 1, 'c': {'count': 99}}
    """
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict) and len(item) <= MANY:
            yield from flat(item, f"{name}.")
        else:
            yield name, {"count": len(item)} if isinstance(item, dict | list) and len(item) > MANY else item
