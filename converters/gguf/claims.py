"""What a GGUF file says of its types, held against the types of its tensors."""

from __future__ import annotations

from collections.abc import Sequence

from converters.gguf.file_types import FILE_TYPES, MIXTURES
from converters.gguf.mixtures import fitting
from converters.gguf.parse import GGUFFile
from dsconvert.events import Check

KEY = "general.file_type"
# Mixtures whose own type is that of experts alone: llama.cpp writes this one for the others' matrices.
DENSE = {"mxfp4_moe": "q8_0"}


def check_file_type(file: GGUFFile) -> Check:
    """The file type that a file states is that of matrices in its blocks; an unknown one is not judged."""
    matrices = [
        (t.qtype.name, t.shape[-1])
        for t in file.tensors.values()
        if len(t.shape) > 1 and t.name.startswith("blk.")
    ]
    stated = file.keys.get(KEY)
    names = [name for name, number in FILE_TYPES.items() if number == stated]
    wrong = [found for name in names if (found := false_mixture(name, matrices))]
    detail = f"{KEY} {names[0]}" if names else f"{KEY} is none that is known, and was not judged"
    return Check("file type", not wrong, "; ".join(wrong) or detail, len(wrong))


def false_mixture(name: str, matrices: Sequence[tuple[str, int]]) -> str:
    """What is wrong with a file type that is stated of matrices of these types and columns, or nothing.

    It names the type of most matrices. Mixtures, overrides by name and rows that do not fill a block give
    others to some, so it is wrong where not one matrix has that type, or what stands in for it.
    """
    default = MIXTURES[name].default
    if not matrices or any(
        kind in (fitting(default, columns), DENSE.get(name, default)) for kind, columns in matrices
    ):
        return ""
    found = ", ".join(sorted({kind for kind, _ in matrices}))
    return f"{KEY} says {name}, but no matrix of a block is {default}: they are {found}"
