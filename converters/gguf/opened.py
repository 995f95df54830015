"""A GGUF file opened for the proof: its weights, its text keys, and what it says of itself."""

from __future__ import annotations

from pathlib import Path

from converters.gguf.as_model import open_model
from converters.gguf.file_types import FILE_TYPES
from converters.gguf.parse import GGUFFile, open_gguf
from dsconvert.proof.result import TypeSize, sizes_by_type
from dsconvert.proof.sources import Opened, commonest, text_handling
from tokenizer_tools.identity import of_metadata


def open_file(path: Path) -> Opened:
    """A GGUF file of a language model as an output to be proven; raises what reading it raises."""
    file = open_gguf(path)
    model = open_model(file)
    sizes = sizes_by_type((t.qtype.name, t.values, t.nbytes) for t in file.tensors.values())
    quant = stated_quant(file, sizes)
    nbytes = sum(part.stat().st_size for part in file.paths)
    text = text_handling(lambda: of_metadata(file.keys))
    return Opened(path, "GGUF", quant, quant, model, model.config, text, sizes, nbytes, file.keys)


def stated_quant(file: GGUFFile, sizes: tuple[TypeSize, ...]) -> str:
    """The mixture that the file says it is; where it says none that is known, its commonest type."""
    names = {number: name for name, number in FILE_TYPES.items()}
    stated = file.keys.get("general.file_type")
    return names.get(stated, commonest(sizes)) if isinstance(stated, int) else commonest(sizes)
