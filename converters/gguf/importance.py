"""Reads importance matrices as llama.cpp writes them: how much each input column of a linear counts.

Two formats: GGUF with general.type "imatrix" (NAME.in_sum2 and NAME.counts, float32; what counts is the sum
of squares divided by the count), and the older .dat (names, calls and sums one after the other, little
endian). Source: tools/imatrix and common/imatrix-loader.cpp of llama.cpp. An importance belongs to columns,
so the reordering of rows that q and k go through does not touch it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from converters.gguf import kernels, mixtures
from converters.gguf.layout import MAGIC
from converters.gguf.parse import GGUFFile, open_gguf
from dsconvert.errors import CheckpointError, UsageError
from dsconvert.reading import read_bytes, read_head

if TYPE_CHECKING:
    from converters.gguf.output import Output

Floats = npt.NDArray[np.float32]
LIMIT = 1 << 30  # of an older .dat, which is read whole; a 405B model's has 100 MB
SUMS, COUNTS = ".in_sum2", ".counts"
REPORT = (
    "dsconvert.calibration"  # the key of the report on the text, in our matrices and what is made of them
)
NO_DATA = "has no data"


@dataclass(frozen=True)
class ImportanceMatrix:
    """Importance by GGUF name, float32 [n_cols], of a stack of matrices [matrices, n_cols].

    `path` is None when it was measured on the way. `unusable` has the reason for each entry left out,
    `untouched` the matrices of a stack that no token came to: theirs is 1. `report` is our own report on the
    calibration text, JSON, "" in other tools' files.
    """

    path: Path | None
    values: dict[str, Floats]
    datasets: tuple[str, ...]
    chunks: int
    unusable: dict[str, str]
    report: str = ""
    untouched: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def keys(self) -> dict[str, tuple[str, str | int]]:
        """The keys that llama-quantize adds to a file that was made with the matrix, and our report."""
        found: dict[str, tuple[str, str | int]] = {}
        if self.path is not None:
            found["quantize.imatrix.file"] = ("string", self.path.name)
        if self.datasets:
            found["quantize.imatrix.dataset"] = ("string", self.datasets[0])
        found["quantize.imatrix.entries_count"] = ("uint32", len(self.values) + len(self.unusable))
        if self.chunks > 0:
            found["quantize.imatrix.chunks_count"] = ("uint32", self.chunks)
        if self.report:
            found[REPORT] = ("string", self.report)
        return found


def read(path: Path) -> ImportanceMatrix:
    """Read an importance matrix of either format.

    Raises CheckpointError when the file is none, is cut short or holds no entry.
    """
    try:
        is_gguf = read_head(path, len(MAGIC)) == MAGIC
    except OSError as error:
        raise CheckpointError(
            "the importance matrix cannot be read", where=path, why=error.strerror or str(error)
        ) from None
    return _from_gguf(open_gguf(path)) if is_gguf else _from_dat(path)


def select(
    matrix: ImportanceMatrix, shapes: Mapping[str, tuple[int, ...]], wanted: Iterable[str]
) -> tuple[dict[str, Floats], dict[str, list[str]]]:
    """What the matrix has for the tensors `wanted`, and the names of the others by the reason why.

    `shapes`, rows first, are those of all tensors. Raises UsageError when the matrix fits none of them: it is
    another model's.
    """
    chosen: dict[str, Floats] = {}
    left: dict[str, list[str]] = {}
    for name in wanted:
        values, wide = matrix.values.get(name), row_shape(shapes[name])
        if values is not None and values.shape == wide:
            chosen[name] = values
        elif values is not None:
            told = f"has {_times(values.shape)} values for {_times(wide)} columns"
            left.setdefault(told, []).append(name)
        else:
            left.setdefault(matrix.unusable.get(name, NO_DATA), []).append(name)
    ours = any(n in shapes and row_shape(shapes[n]) == v.shape for n, v in matrix.values.items())
    if left and not ours:
        known = ", ".join([*matrix.values, *matrix.unusable][:2])
        raise UsageError(
            "the importance matrix has nothing for this model",
            where=matrix.path or "",
            why=f"its entries are such as {known}; {next(iter(left.values()))[0]} {next(iter(left))}",
            hint="Make one from this model: dsconvert imatrix MODEL --outfile imatrix.gguf",
        )
    return chosen, left


def _times(shape: tuple[int, ...]) -> str:
    return " times ".join(map(str, shape))


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the importance of a tensor: a row for each matrix that is stacked in it."""
    return (shape[0], shape[-1]) if len(shape) > 2 else shape[-1:]


def weigh(matrix: ImportanceMatrix | None, outputs: Sequence[Output]) -> tuple[dict[str, Floats], list[str]]:
    """The importance of every tensor whose type takes one, and notes on those that go without, by name.

    Raises UsageError when the matrix is another model's, or lacks what a mixture cannot do without.
    """
    if matrix is None:
        return {}, []
    wanted = takers(outputs)
    if not wanted:
        return {}, ["--imatrix changes nothing: no tensor gets a type that takes an importance matrix"]
    shapes = {name: tensor.shape for output in outputs for name, tensor in output.tensors.items()}
    weights, left = select(matrix, shapes, wanted)
    for output in outputs:
        lacking = [name for name in output.tensors if name not in weights]
        mixtures.check_importance(output.quant, {name: output.tensors[name].qtype.name for name in lacking})
    notes = [
        f"quantized without importance, for which the matrix {why}: {', '.join(names)}"
        for why, names in left.items()
    ]
    notes += [
        f"{name}: no token came to {len(numbers)} of {weights[name].shape[0]} matrices, number "
        f"{', '.join(map(str, numbers[:8]))}{' and more' * (len(numbers) > 8)}: their columns count alike"
        for name, numbers in matrix.untouched.items()
        if name in weights
    ]
    return weights, notes


def takers(outputs: Sequence[Output]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors whose type takes importance, by name."""
    tensors = [tensor for output in outputs for tensor in output.tensors.values()]
    return {tensor.name: tensor.shape for tensor in tensors if kernels.takes_importance(tensor.qtype)}


def _from_gguf(file: GGUFFile) -> ImportanceMatrix:
    kind = file.keys.get("general.type")
    names = dict.fromkeys(
        name.removesuffix(end) for name in file.tensors for end in (SUMS, COUNTS) if name.endswith(end)
    )
    if kind != "imatrix" or not names:
        why = f"its general.type is {str(kind)[:40]!r}, it has {len(names)} entries"
        raise CheckpointError("is not an importance matrix", where=file.path, why=why)
    values, unusable, untouched = quotients(
        {name + end: _flat(file, name + end) for name in names for end in (SUMS, COUNTS)}
    )
    datasets = file.keys.get("imatrix.datasets", [])
    chunks = file.keys.get("imatrix.chunk_count", 0)
    report = file.keys.get(REPORT, "")
    return ImportanceMatrix(
        file.path,
        values,
        tuple(text for text in datasets if isinstance(text, str)) if isinstance(datasets, list) else (),
        chunks if isinstance(chunks, int) else 0,
        unusable,
        report if isinstance(report, str) else "",
        untouched,
    )


def quotients(
    tensors: Mapping[str, Floats],
) -> tuple[dict[str, Floats], dict[str, str], dict[str, tuple[int, ...]]]:
    """The importance in the tensors of a GGUF matrix, NAME.in_sum2 and NAME.counts.

    Beside it what is unusable, with the reason, and which matrices of a stack no token came to.
    """
    values: dict[str, Floats] = {}
    unusable: dict[str, str] = {}
    untouched: dict[str, tuple[int, ...]] = {}
    for name in (n.removesuffix(SUMS) for n in tensors if n.endswith(SUMS)):
        counts = tensors[name + COUNTS].reshape(-1)
        _keep(name, tensors[name + SUMS].reshape(-1), counts, values, unusable)
        if name in values and not (counts > 0).all():
            untouched[name] = tuple(np.flatnonzero(~(counts > 0)).tolist())
    return values, unusable, untouched


def _flat(file: GGUFFile, name: str) -> Floats:
    """A tensor's values in one row; raises CheckpointError when it is missing or no float32."""
    tensor = file.tensors.get(name)
    if tensor is None or tensor.qtype.name != "f32":
        raise CheckpointError(
            f"the entry {name[:80]!r} is {'missing' if tensor is None else 'of type ' + tensor.qtype.name}",
            where=file.path,
            why="every entry is a pair of float32 tensors, in_sum2 and counts",
        )
    return tensor.float32().reshape(-1)


def _keep(
    name: str, sums: Floats, counts: Floats, values: dict[str, Floats], unusable: dict[str, str]
) -> None:
    """Put sums / count into `values`, or the reason why not into `unusable`."""
    # A count is rounded and the quotient taken in float32, as llama.cpp does: the bytes depend on it.
    count = np.floor(counts.astype(np.float64) + 0.5).astype(np.float32)
    if not counts.size or sums.size % counts.size:
        unusable[name] = f"has {sums.size} values for {counts.size} matrices"
    elif not (count > 0).any():
        unusable[name] = "has a count of 0: its input was never seen"
    else:
        rows = sums.reshape(counts.size, -1)
        with np.errstate(all="ignore"):  # of a matrix that no token came to all columns count alike
            quotient = np.where(count[:, None] > 0, rows / count[:, None], 1).astype(np.float32)
        quotient = quotient if counts.size > 1 else quotient[0]
        if not np.isfinite(quotient).all() or (quotient < 0).any():
            unusable[name] = "has values that are negative, NaN or infinite"
        else:
            values[name] = quotient


class _Bytes:
    """A position in the file; every read is checked against the end."""

    def __init__(self, path: Path) -> None:
        self.data, self.path, self.at = read_bytes(path, LIMIT), path, 0

    def take(self, size: int, what: str) -> bytes:
        if size < 0 or self.at + size > len(self.data):
            raise CheckpointError(
                "is not an importance matrix, or is cut short",
                where=self.path,
                why=f"{what} does not fit in its {len(self.data)} bytes at byte {self.at}",
                hint="Give a file made by dsconvert imatrix or llama-imatrix",
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])

    def string(self, what: str) -> str:
        return self.take(self.number(what), what).decode("utf-8", errors="replace")


def _from_dat(path: Path) -> ImportanceMatrix:
    source = _Bytes(path)
    n_entries = source.number("the number of entries")
    if n_entries < 1:
        raise CheckpointError("is not an importance matrix", where=path, why=f"it has {n_entries} entries")
    values: dict[str, Floats] = {}
    unusable: dict[str, str] = {}
    for number in range(n_entries):
        name = source.string(f"the name of entry {number}")
        calls = source.number(f"entry {number}")
        size = 4 * source.number(f"entry {number}")
        sums = np.frombuffer(source.take(size, f"entry {number}"), "<f4").astype(np.float32)
        _keep(name, sums, np.array([calls], np.float32), values, unusable)
    # What was run through the model stands at the end, in newer versions' files only.
    chunks = source.number("the number of chunks") if source.at < len(source.data) else 0
    dataset = source.string("the data set's name") if source.at < len(source.data) else ""
    return ImportanceMatrix(path, values, (dataset,) if dataset else (), chunks, unusable)
