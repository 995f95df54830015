"""The vocabulary of the architecture tables: a row, a row with its layer, a layout transform, the plan.

One table per architecture has three readers: the converter (names and layout), the calibrator (which
linears, in which order) and the verifier (the inverse layout, back to logits).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, Protocol

import numpy.typing as npt

from dsconvert.errors import PlanError
from dsconvert.models.diagnosis import resized, unfit

Array = npt.NDArray[Any]
Role = Literal[
    "embed", "norm", "qkv", "o", "gate_up", "down", "head", "vision", "latent", "router", "weigher"
]
SOLVE_ORDER: tuple[Role, ...] = ("qkv", "o", "gate_up", "down")


class Sizes(Protocol):
    """What a plan needs to know of a config: ModelConfig for a decoder, VisionConfig for towers."""

    @property
    def architecture(self) -> str: ...

    @property
    def tied(self) -> bool: ...

    @property
    def dims(self) -> Mapping[str, int]: ...


@dataclass(frozen=True)
class Transform:
    """A layout change inside each unit of a tensor's rows, a head for example, and its inverse.

    `units` is the dimension that counts the units; "" stands for rows that stay as they are, of a tensor that
    is one unit. `forward` takes source rows as [units, rows, ...] and returns a view of them in the stored
    order, units first; `inverse` takes [units, ...] of the stored shape. Neither changes a value or a dtype.
    """

    forward: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    units: str = ""


def _interleave(x: Array) -> Array:
    """[heads, 2 * half, ...] with halves apart -> view [heads, half, 2, ...] with pairs adjacent."""
    return x.reshape(len(x), 2, x.shape[1] // 2, *x.shape[2:]).swapaxes(1, 2)


def _separate(x: Array) -> Array:
    """The inverse of `_interleave`: -> view [heads, 2, half, ...]."""
    return x.reshape(len(x), x.shape[1] // 2, 2, *x.shape[2:]).swapaxes(1, 2)


def _same(x: Array) -> Array:
    return x


def _turned(x: Array) -> Array:
    """[heads, rows, columns] -> view [heads, columns, rows]."""
    return x.swapaxes(1, 2)


IDENTITY = Transform(_same, _same)
# Hugging Face rotates halves; of some architectures llama.cpp rotates adjacent pairs.
ROPE_Q = Transform(_interleave, _separate, "heads")
ROPE_K = Transform(_interleave, _separate, "kv_heads")
# A slice of each head's rows, as it is or with rows and columns changed about (MLA's kv_b).
HEADS = Transform(_same, _same, "heads")
HEADS_TURNED = Transform(_turned, _turned, "heads")


@dataclass(frozen=True)
class Row:
    """A row: Hugging Face name, GGUF name, role, shape in the letters of `ModelConfig.dims`.

    `{i}` in a name stands for the layer: those from the dimension `first` on and before `depth`, which is all
    of them unless a table says otherwise; a dimension "letter.layer" goes before one that all layers share.
    `{e}` in `hf` stands for the expert: the stored tensor stacks their matrices in its first dimension.
    `part=(k, sizes)` takes the k-th of the slices, of these sizes, of each unit's rows (see Transform).
    `source` is the shape in the checkpoint, of one expert, where that is another. An `optional` row may be
    absent, in all layers. `when` names the config flag without which the row must be absent. `tied_to` names
    the row whose tensor the runtime uses instead. A size that all models share may stand as a number.
    """

    hf: str
    gguf: str
    role: Role
    shape: tuple[str, ...]
    transform: Transform = IDENTITY
    part: tuple[int, tuple[str, ...]] | None = None
    optional: bool = False
    when: str = ""
    tied_to: str = ""
    first: str = "0"
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

    `hf` is a pattern where it is made of many tensors. `shape` is the stored tensor's, rows first, `source`
    that of each of the checkpoint's. `units` counts its units of rows (see Transform), of each of which it
    takes the rows `part[0]` to `part[1]` - 1.
    """

    hf: str
    gguf: str
    role: Role
    shape: tuple[int, ...]
    layer: int | None
    row: Row
    source: tuple[int, ...]
    units: int
    part: tuple[int, int]

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint's tensors that it is made of, in order."""
        return tuple(self.hf.replace("{e}", str(e)) for e in range(self.many))

    @property
    def many(self) -> int:
        """How many tensors of the checkpoint it is made of."""
        return self.shape[0] if "{e}" in self.hf else 1

    @property
    def rows(self) -> int:
        """How many rows of its last axis the stored tensor has; the values of a vector are rows of one."""
        return prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]

    @property
    def values(self) -> int:
        """How many values of the checkpoint it takes."""
        return prod(self.shape)


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
    spans = [(row, range(_size(row.first, dims), _size(row.depth, dims))) for row in layered]
    for i in range(max((span.stop for _, span in spans), default=0)):
        specs += [_spec(row, dims, i) for row, span in spans if i in span]
    return specs


def _size(letter: str, dims: Mapping[str, int], layer: int | None = None) -> int:
    return int(dims.get(f"{letter}.{layer}", dims.get(letter, letter)))


def _spec(row: Row, dims: Mapping[str, int], layer: int | None) -> Spec:
    def sizes(letters: Iterable[str]) -> tuple[int, ...]:
        return tuple(_size(letter, dims, layer) for letter in letters)

    shape, slices = sizes(row.shape), sizes(row.part[1] if row.part else ())
    (units,) = sizes((row.transform.units or "1",))
    each = shape[1:] if "{e}" in row.hf else shape
    source = sizes(row.source) or (sum(slices) or each[0], *each[1:])
    part = (0, source[0] // units)
    if row.part:
        k = row.part[0]
        part = (sum(slices[:k]), sum(slices[: k + 1]))
    number = "" if layer is None else str(layer)
    hf, gguf = (name.replace("{i}", number) for name in (row.hf, row.gguf))
    return Spec(hf, gguf, row.role, shape, layer, row, source, units, part)


def plan(table: Table, config: Sizes, shapes: Mapping[str, tuple[int, ...]]) -> list[Spec]:
    """Match table and checkpoint both ways, before any work.

    `shapes` are the checkpoint's. Returns the tensors to write, in the table's order.
    Raises PlanError naming each missing, unexplained or misshapen tensor and its nearest row.
    """
    candidates = expand(table, config)
    # An optional tensor is there in every layer or in none.
    begun = {spec.row.hf for spec in candidates if spec.row.optional and _begun(spec, shapes)}
    wanted = [spec for spec in candidates if _wanted(spec, config, shapes, begun)]
    known = {name for spec in wanted for name in spec.names}
    dropped = [re.compile(pattern) for pattern in table.drop]
    missing = list(dict.fromkeys(name for spec in wanted for name in spec.names if name not in shapes))
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
        _check_shape(spec, shapes)
    return wanted


def plan_stored(
    table: Table, config: Any, shapes: Mapping[str, tuple[int, ...]], derived: Collection[str] = ()
) -> list[Spec]:
    """As `plan`, for a GGUF file: `shapes` are by GGUF name, rows first; errors name the GGUF tensors.

    `derived` are the tensors that the file may hold and no checkpoint does.
    """
    stored = Table(
        tuple(replace(row, hf=row.gguf, part=None, source=(), transform=IDENTITY) for row in table.rows),
        (*map(re.escape, derived), r"rope_freqs\.weight"),
    )
    originals = {spec.gguf: spec for spec in expand(table, config)}
    return [originals[spec.gguf] for spec in plan(stored, config, shapes)]


def fit_stored(
    table: Table, config: Any, shapes: Mapping[str, tuple[int, ...]], derived: Collection[str] = ()
) -> tuple[list[Spec], list[str]]:
    """As `plan_stored`, of existing tensors: those that fit the table, and a sentence on each other one."""
    specs = {spec.gguf: spec for spec in expand(table, config)}
    fitting, strange = [], []
    for name, shape in shapes.items():
        if name not in specs:
            if name not in derived and name != "rope_freqs.weight":
                strange.append(f"{name[:120]} is not a tensor of {config.architecture}")
        elif shape != specs[name].shape:
            strange.append(f"{name} has shape {list(shape)}, the file's keys say {list(specs[name].shape)}")
        else:
            fitting.append(specs[name])
    return fitting, strange


def _wanted(spec: Spec, config: Sizes, shapes: Mapping[str, tuple[int, ...]], begun: Collection[str]) -> bool:
    if spec.row.when and not getattr(config, spec.row.when):
        return False
    if spec.row.optional:
        return spec.row.hf in begun
    return _begun(spec, shapes) or not (spec.row.tied_to and config.tied)


def _begun(spec: Spec, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return any(name in shapes for name in spec.names)


def check_shapes(table: Table, config: Sizes, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise PlanError for the first tensor of the table that has another shape than the config says."""
    for spec in expand(table, config):
        _check_shape(spec, shapes)


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


def _check_shape(spec: Spec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name in spec.names:
        shape = shapes.get(name, spec.source)
        if shape != spec.source:
            letters = spec.row.source or spec.row.shape[-len(spec.source) :]
            raise PlanError(
                f"has shape {list(shape)}, config.json asks for {list(spec.source)}",
                where=name,
                hint=resized(letters, shape, spec.source),
            )
