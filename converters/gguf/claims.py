"""What a GGUF file says of its types, held against the types of its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from converters.gguf.file_types import FILE_TYPES, MIXTURES
from converters.gguf.layout import Tensor
from converters.gguf.mixtures import fitting
from converters.gguf.parse import GGUFFile, StoredTensor
from dsconvert.events import Check

KEY = "general.file_type"
# Mixtures whose own type is that of experts alone: llama.cpp writes this one for the others' matrices.
DENSE = {"mxfp4_moe": "q8_0"}


def check_file_type(file: GGUFFile) -> Check:
    """The file type that a file states is that of matrices in its blocks; an unknown one is not judged."""
    matrices = block_matrices(file.tensors.values())
    stated = file.keys.get(KEY)
    names = [name for name, number in FILE_TYPES.items() if number == stated]
    wrong = [found for name in names if (found := false_mixture(name, matrices))]
    detail = f"{KEY} {names[0]}" if names else f"{KEY} is none that is known, and was not judged"
    return Check("file type", not wrong, "; ".join(wrong) or detail, len(wrong))


def true_mixture(asked: str, tensors: Sequence[Tensor]) -> str:
    """The mixture to state in a file: the one that was asked for, unless overrides by name left none of it.

    Then it is the first mixture that is mostly of the type that most matrices of the blocks have. A file of
    llama-quantize states what was asked for in any case.

    >>> from converters.gguf.qtypes import QTYPES
    >>> true_mixture("q8_0", [Tensor("blk.0.ffn_up.weight", (256, 256), QTYPES["q5_k"])])
    'q5_k_s'
    """
    matrices = block_matrices(tensors)
    if not false_mixture(asked, matrices):
        return asked
    types = Counter(kind for kind, _ in matrices)
    found = [name for kind, _ in types.most_common() for name, m in MIXTURES.items() if m.default == kind]
    return found[0] if found else asked


def mostly(tensors: Sequence[Tensor]) -> str:
    """The mixture to state of types that no rule chose: the first of the type of most bytes of the blocks.

    >>> from converters.gguf.qtypes import QTYPES
    >>> mostly([Tensor("blk.0.ffn_up.weight", (256, 256), QTYPES["q4_k"])])
    'q4_k_s'
    """
    nbytes: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1 and tensor.name.startswith("blk."):
            nbytes[tensor.qtype.name] += tensor.nbytes
    types = [kind for kind, _ in nbytes.most_common()]
    return next((name for kind in types for name, m in MIXTURES.items() if m.default == kind), "f16")


def block_matrices(tensors: Iterable[Tensor | StoredTensor]) -> list[tuple[str, int]]:
    """Type and columns of each matrix that a block has."""
    return [(t.qtype.name, t.shape[-1]) for t in tensors if len(t.shape) > 1 and t.name.startswith("blk.")]


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
