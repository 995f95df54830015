"""A GGUF file opened for the proof: its weights, its text keys, and what it says of itself."""

from __future__ import annotations

from pathlib import Path

from converters.gguf.as_model import open_parts
from converters.gguf.claims import check_file_type
from converters.gguf.file_types import FILE_TYPES
from converters.gguf.layout import BY_COST
from converters.gguf.parse import GGUFFile, open_gguf
from dsconvert.proof.result import TypeSize, sizes_by_type
from dsconvert.proof.sources import Opened, StoredTensors, commonest, text_handling
from dsconvert.proof.thresholds import widest
from tokenizer_tools.identity import of_metadata


def open_file(path: Path) -> Opened:
    """A GGUF file of a language model as an output to be proven; raises what reading it raises."""
    file = open_gguf(path)
    model, strange = open_parts(file)
    sizes = sizes_by_type((t.qtype.name, t.values, t.nbytes) for t in file.tensors.values())
    quant = stated_quant(file, sizes)
    nbytes = sum(part.stat().st_size for part in file.paths)
    text = text_handling(lambda: of_metadata(file.keys))
    return Opened(
        path, "GGUF", quant, widest((size.type, size.weights) for size in sizes), model, model.config, text,
        sizes, nbytes, stored_tensors(file),
        f"{len(file.tensors)} tensors, {len(file.typed)} keys", (*strange, *narrow_vectors(file)),
        own=lambda reference: [check_file_type(file)], keys=file.keys,
        by_cost={key.removeprefix(BY_COST): value for key, value in file.keys.items() if BY_COST in key},
    )  # fmt: skip


def stored_tensors(file: GGUFFile) -> StoredTensors:
    """Name, shape and type of every tensor."""
    return frozenset((t.name, t.shape, t.qtype.name) for t in file.tensors.values())


def narrow_vectors(file: GGUFFile) -> list[str]:
    """A sentence on each norm or bias that is not in float32, in which llama.cpp adds and multiplies."""
    vectors = [t for t in file.tensors.values() if len(t.shape) == 1]
    return [f"{t.name[:120]} is {t.qtype.name}, f32 is needed" for t in vectors if t.qtype.name != "f32"]


def stated_quant(file: GGUFFile, sizes: tuple[TypeSize, ...]) -> str:
    """The mixture that the file says it is; where it says none that is known, its commonest type."""
    names = {number: name for name, number in FILE_TYPES.items()}
    stated = file.keys.get("general.file_type")
    return names.get(stated, commonest(sizes)) if isinstance(stated, int) else commonest(sizes)
