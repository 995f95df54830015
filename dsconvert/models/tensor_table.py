"""The vocabulary of the architecture tables: a row, a row with its layer, a layout transform, the plan.

One table per architecture has three readers: the converter (names and layout), the calibrator (which
linears, in which order) and the verifier (the inverse layout, back to logits).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from dsconvert.errors import PlanError
from dsconvert.models.diagnosis import resized, unfit

Array = npt.NDArray[Any]
Role = Literal["embed", "norm", "qkv", "o", "gate_up", "down", "head", "vision"]
SOLVE_ORDER: tuple[Role, ...] = ("qkv", "o", "gate_up", "down")


class Sizes(Protocol):
    """What a plan needs to know of a config: ModelConfig for a decoder, VisionConfig for towers."""

    @property
    def architecture(self) -> str: ...

    @property
    def tied(self) -> bool: ...

    @property
    def dims(self) -> Mapping[str, int]: ...


class WeightSource(Protocol):
    """A model on disk, whatever its format: gives a tensor by its Hugging Face name."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by name, without reading weights."""
        ...

    def dtype(self, name: str) -> str:
        """The stored type of a tensor: "bf16", "f16", "f32" or a quantized type's name."""
        ...

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor's values in float32, dequantized where need be, in the Hugging Face layout."""
        ...

    def float32_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows `start` to `stop` - 1 of a matrix, as `float32` would give them.

        Made for embedding and head, which are read in slices: for them it costs what the rows cost. Where
        a format stores the rows in another order it may read the whole tensor.
        """
        ...

    def nearest(self, name: str, start: int, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        """What plain rounding to nearest in this tensor's own type and settings makes of another's rows.

        `rows` float32 [n, columns] stand for rows `start` and following; they are not changed. Same shape,
        float32; None where nothing here rounds to the type. It is what a faithful tensor is held against.
        """
        ...


@dataclass(frozen=True)
class Transform:
    """A layout change between the Hugging Face tensor and the stored one, and its inverse.

    `forward` gives a view whose leading axis is the unit of work (rows, or heads of rows); flattened to
    rows it is the stored tensor. `inverse` takes the stored tensor's rows and gives such a view of the
    source's. Neither changes a value or a dtype.
    """

    forward: Callable[[Array, Any], Array]
    inverse: Callable[[Array, Any], Array]


@np.errstate(over="ignore")  # infinity is met, and told, where the value is used
def rounded(array: Array) -> Array:
    """Float64 values as float32, a copy; what is of another type as it is."""
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _interleave(x: Array, heads: int) -> Array:
    """[heads * 2 * half, ...] with halves apart -> view [heads, half, 2, ...] with pairs adjacent."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2)


def _separate(x: Array, heads: int) -> Array:
    """The inverse of `_interleave`: -> view [heads, 2, half, ...]."""
    return x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:]).swapaxes(1, 2)


def _same(x: Array, config: Sizes) -> Array:
    return x


IDENTITY = Transform(_same, _same)
SQUEEZE = Transform(lambda x, c: x[0], lambda x, c: x[None])  # a leading axis of one
# Hugging Face rotates halves; of some architectures llama.cpp rotates adjacent pairs.
ROPE_Q = Transform(lambda x, c: _interleave(x, c.heads), lambda x, c: _separate(x, c.heads))
ROPE_K = Transform(lambda x, c: _interleave(x, c.kv_heads), lambda x, c: _separate(x, c.kv_heads))


@dataclass(frozen=True)
class Row:
    """A row: Hugging Face name, GGUF name, role, shape in the letters of `ModelConfig.dims`.

    `{i}` in a name stands for the layer, counted by the dimension `depth`; a dimension "letter.layer" goes
    before one that all layers share. `part=(k, n)` takes the k-th of n equal slices of the source's rows.
    `source` is the shape in the checkpoint where that is another. An `optional` row may be absent, in all
    layers. `when` names the config flag without which the row must be absent. `tied_to` names the row whose
    tensor the runtime uses instead.
    """

    hf: str
    gguf: str
    role: Role
    shape: tuple[str, ...]
    transform: Transform = IDENTITY
    part: tuple[int, int] = (0, 1)
    optional: bool = False
    when: str = ""
    tied_to: str = ""
    depth: str = "layers"
    source: tuple[str, ...] = ()


# What trainers and runtimes leave beside the weights, under any name: RoPE's and masks' buffers, scales of a
# quantized KV cache, an engine's private state, the value head of a policy.
DROP = (
    r"(.+\.)?(inv_freq|original_inv_freq|cos_cached|sin_cached|masked_bias|position_ids|_extra_state)",
    r"(.+\.)?self_attn\.(\w+\.)?(q|k|v|kv|prob)_(scale|zero_point)",
    r"(.+\.)?self_attn\.[kv]_proj\.output_scale",
    r"(.+\.)?(v_head|value_head)\..+",
)


@dataclass(frozen=True)
class Table:
    """The rows of a model, and patterns of tensors that checkpoints may carry and no forward pass uses."""

    rows: tuple[Row, ...]
    drop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spec:
    """A row with its layer: one tensor of one model.

    `shape` is the stored tensor's, rows first, `source` the checkpoint's.
    """

    hf: str
    gguf: str
    role: Role
    shape: tuple[int, ...]
    layer: int | None
    row: Row
    source: tuple[int, ...] = ()

    def forward(self, source: Array, config: Sizes) -> Array:
        """The stored layout of the source tensor, as a view; see Transform."""
        k, n = self.row.part
        rows = source.shape[0] // n
        return self.row.transform.forward(source[k * rows : (k + 1) * rows], config)

    def inverse(self, stored: Array, config: Sizes) -> Array:
        """The Hugging Face layout of the stored tensor, contiguous, same shape."""
        return self.row.transform.inverse(stored, config).reshape(stored.shape)


def prefixed(rows: Iterable[Row], prefix: str) -> tuple[Row, ...]:
    """The table mounted under `prefix` inside a bigger model."""
    return renamed(rows, lambda name: prefix + name)


def renamed(rows: Iterable[Row], name: Callable[[str], str]) -> tuple[Row, ...]:
    """The table with other names for the same tensors."""
    return tuple(replace(row, hf=name(row.hf), tied_to=row.tied_to and name(row.tied_to)) for row in rows)


def expand(table: Table, config: Sizes) -> list[Spec]:
    """Every tensor that the table can name for this config: whole-model rows, then layer by layer."""
    dims = config.dims
    single = [row for row in table.rows if "{i}" not in row.hf]
    layered = [row for row in table.rows if "{i}" in row.hf]
    specs = [_spec(row, dims, None) for row in single]
    for i in range(max((dims[row.depth] for row in layered), default=0)):
        specs += [_spec(row, dims, i) for row in layered if i < dims[row.depth]]
    return specs


def _spec(row: Row, dims: Mapping[str, int], layer: int | None) -> Spec:
    def size(letter: str) -> int:
        return int(dims.get(f"{letter}.{layer}", dims.get(letter, letter)))

    shape = tuple(map(size, row.shape))
    source = tuple(map(size, row.source)) or (shape[0] * row.part[1], *shape[1:])
    number = "" if layer is None else str(layer)
    hf, gguf = (name.replace("{i}", number) for name in (row.hf, row.gguf))
    return Spec(hf, gguf, row.role, shape, layer, row, source)


def plan(table: Table, config: Sizes, shapes: Mapping[str, tuple[int, ...]]) -> list[Spec]:
    """Match table and checkpoint both ways, before any work.

    `shapes` are the checkpoint's. Returns the tensors to write, in the table's order.
    Raises PlanError naming each missing, unexplained or misshapen tensor and its nearest row.
    """
    candidates = expand(table, config)
    # An optional tensor is there in every layer or in none.
    begun = {spec.row.hf for spec in candidates if spec.row.optional and spec.hf in shapes}
    wanted = [spec for spec in candidates if _wanted(spec, config, shapes, begun)]
    known = {spec.hf for spec in wanted}
    dropped = [re.compile(pattern) for pattern in table.drop]
    missing = [spec.hf for spec in wanted if spec.hf not in shapes]
    unknown = [n for n in shapes if n not in known and not any(p.fullmatch(n) for p in dropped)]
    if missing or unknown:
        heads = {spec.hf for spec in wanted if spec.row.tied_to}
        what, hint = unfit(missing, unknown, heads)
        counted = (
            _listed("missing", missing, unknown or list(shapes)),
            _listed("unknown", unknown, missing or list(known)),
        )
        raise PlanError(
            f"the tensors {what or f'are not those of {config.architecture}'}",
            why="; ".join(filter(None, counted)),
            hint=hint,
        )
    for spec in wanted:
        _check_shape(spec, shapes[spec.hf])
    return wanted


def plan_stored(
    table: Table, config: Any, shapes: Mapping[str, tuple[int, ...]], derived: Collection[str] = ()
) -> list[Spec]:
    """As `plan`, for a GGUF file: `shapes` are by GGUF name, rows first; errors name the GGUF tensors.

    `derived` are the tensors that the file may hold and no checkpoint does.
    """
    stored = Table(
        tuple(replace(row, hf=row.gguf, part=(0, 1), source=()) for row in table.rows),
        (*map(re.escape, derived), r"rope_freqs\.weight"),
    )
    originals = {spec.gguf: spec for spec in expand(table, config)}
    return [originals[spec.gguf] for spec in plan(stored, config, shapes)]


def _wanted(spec: Spec, config: Sizes, shapes: Mapping[str, tuple[int, ...]], begun: Collection[str]) -> bool:
    if spec.row.when and not getattr(config, spec.row.when):
        return False
    if spec.row.optional:
        return spec.row.hf in begun
    return spec.hf in shapes or not (spec.row.tied_to and config.tied)


def check_shapes(table: Table, config: Sizes, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise PlanError for the first tensor of the table that has another shape than the config says."""
    for spec in expand(table, config):
        if spec.hf in shapes:
            _check_shape(spec, shapes[spec.hf])


def _listed(label: str, names: list[str], others: list[str]) -> str:
    """`label`: up to three names, each with its nearest other, and how many more there are."""
    if not names:
        return ""
    shown = []
    for name in names[:3]:
        near = difflib.get_close_matches(name, others[:4000], n=1, cutoff=0.7)
        shown.append(f"{name[:120]!r}" + (f" (nearest: {near[0][:120]!r})" if near else ""))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {label}: {', '.join(shown)}{more}"


def _check_shape(spec: Spec, shape: tuple[int, ...]) -> None:
    if shape != spec.source:
        raise PlanError(
            f"has shape {list(shape)}, config.json asks for {list(spec.source)}",
            where=spec.hf,
            hint=resized(spec.row.source or spec.row.shape, shape, spec.source),
        )
