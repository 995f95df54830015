"""The layout of a table's row, some rows at a time: a stored tensor's rows from a checkpoint's, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from dsconvert.models.tensor_table import Spec
from dsconvert.models.weights import Array, Floats, widened

Read = Callable[[str, int, int], Array]  # the name of a tensor, the first of its rows, the end of them


def chunks(spec: Spec, values: int) -> Iterator[tuple[int, int]]:
    """Ranges of the stored tensor's rows, in order, of at most `values` values where its units allow.

    A range is of one tensor of the checkpoint, and takes whole units or whole rows of it: `stored_rows` of
    all ranges reads nothing twice.
    """
    each = spec.rows // spec.many
    least = _per_unit(spec) if spec.row.transform.units else _per_row(spec)
    step = max(1, values * spec.rows // spec.values // least) * least
    for first in range(0, spec.rows, each):
        for start in range(first, first + each, step):
            yield start, min(start + step, first + each)


def stored_rows(spec: Spec, read: Read, start: int, stop: int) -> Array:
    """Rows `start` to `stop` - 1 of the stored tensor, [rows, columns]; of a vector values, [values, 1].

    `read` returns rows of the checkpoint's tensors, as WeightSource.rows does; the result is of its type.
    """
    each, parts = spec.rows // spec.many, []
    for index in range(start // each, -(-stop // each)):
        span = max(start - index * each, 0), min(stop - index * each, each)
        parts.append(_of_one(spec, spec.names[index], read, *span))
    return joined(parts)


def _of_one(spec: Spec, name: str, read: Read, start: int, stop: int) -> Array:
    """Some of the stored rows that are made of one tensor of the checkpoint, counted among them."""
    low, high = spec.part
    if not spec.row.transform.units:
        each = _per_row(spec)
        first, last = start // each, -(-stop // each)
        rows = read(name, low + first, low + last)
        return rows.reshape((last - first) * each, -1)[start - first * each : stop - first * each]
    each, height = _per_unit(spec), spec.source[0] // spec.units
    first, last = start // each, -(-stop // each)
    rows = read(name, first * height, last * height)
    units = rows.reshape(last - first, height, *rows.shape[1:])[:, low:high]
    stored = spec.row.transform.forward(units).reshape((last - first) * each, -1)
    return stored[start - first * each : stop - first * each]


def source_rows(specs: Sequence[Spec], name: str, read: Read, start: int, stop: int) -> Floats:
    """Rows `start` to `stop` - 1 of the checkpoint's tensor `name` in float32.

    `specs` are the stored tensors made of it, in the order of their parts (see `by_source`); `read` returns
    rows of them as `stored_rows` does, by GGUF name.
    """
    whole = specs[0].source
    if not specs[0].row.transform.units:
        parts = [_kept_rows(spec, name, read, start, stop) for spec in specs]
        return joined([part for part in parts if len(part)] or parts[:1])
    height = whole[0] // specs[0].units
    first, last = start // height, -(-stop // height)
    units = joined([_units(spec, name, read, first, last) for spec in specs], axis=1)
    rows = units.reshape((last - first) * height, *whole[1:])
    return np.ascontiguousarray(rows[start - first * height : stop - first * height])


def by_source(specs: Iterable[Spec]) -> dict[str, tuple[Spec, ...]]:
    """The stored tensors made of each tensor of the checkpoint, in the order of their parts of it."""
    found: dict[str, tuple[Spec, ...]] = {}
    for spec in specs:
        for name in spec.names:
            found[name] = (*found.get(name, ()), spec)
    return {name: tuple(sorted(parts, key=lambda spec: spec.part)) for name, parts in found.items()}


def _kept_rows(spec: Spec, name: str, read: Read, start: int, stop: int) -> Floats:
    """The rows in a range of the source's that are stored in this tensor, as they are."""
    low, high = spec.part
    count, each = max(min(stop, high) - max(start, low), 0), _per_row(spec)
    first = _first(spec, name) + (max(start, low) - low) * each
    return widened(read(spec.gguf, first, first + count * each)).reshape(count, *spec.source[1:])


def _units(spec: Spec, name: str, read: Read, first: int, last: int) -> Floats:
    """This tensor's share of some units of the source, [units, rows, ...]."""
    each, at = _per_unit(spec), _first(spec, name)
    stored = widened(read(spec.gguf, at + first * each, at + last * each))
    columns = spec.values // spec.rows
    shape = (each,) if len(spec.shape) == 1 else (each, columns)
    inverse = spec.row.transform.inverse(stored.reshape(last - first, *shape))
    return inverse.reshape(last - first, spec.part[1] - spec.part[0], *spec.source[1:])


def joined(parts: Sequence[Array], axis: int = 0) -> Array:
    """Rows of several tensors as one array, float32 where they are not all bf16."""
    if len(parts) == 1:
        return parts[0]
    mixed = len({part.dtype for part in parts}) > 1
    return np.concatenate([widened(part) if mixed else part for part in parts], axis)


def _first(spec: Spec, name: str) -> int:
    """The first of the stored rows that are made of the checkpoint's tensor `name`."""
    return spec.names.index(name) * (spec.rows // spec.many)


def _per_unit(spec: Spec) -> int:
    """Stored rows of a unit."""
    return spec.rows // spec.many // spec.units


def _per_row(spec: Spec) -> int:
    """Stored rows of a row of the source."""
    return spec.rows // spec.many // (spec.part[1] - spec.part[0])
