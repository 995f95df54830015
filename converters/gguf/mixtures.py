"""Which type each tensor of a file gets: the mixtures of llama-quantize as tables.

The rules are those of llama.cpp's src/llama-quant.cpp (llama_tensor_get_type).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from converters.gguf.file_types import ALIASES, MIXTURES, Mixture
from converters.gguf.places import Place
from converters.gguf.qtypes import NEEDED, QTYPES, WANTED
from dsconvert.errors import UsageError
from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import ModelConfig

# The names that llama.cpp counts by role.
_ROLES = {
    "attn_q": "attn_q.weight",
    "attn_k": "attn_k.weight",
    "attn_v": "attn_v.weight",
    "attn_output": "attn_output.weight",
    "ffn_gate": "ffn_gate",
    "ffn_up": "ffn_up",
    "ffn_down": "ffn_down",
}
_WHOLE_MODEL = ("token_embd.weight", "output.weight")
_ROUTER = "ffn_gate_inp.weight"  # float32 in every file: rounded, it takes another expert now and then
_WIDE = "indexer.proj.weight"  # float32 where matrices are not quantized, as llama.cpp's converter has it
_LAYER = re.compile(r"\bblk\.(\d+)\.")


@dataclass(frozen=True)
class Choice:
    """The type of one tensor; `wanted` is another one when its rows did not fit that type's blocks."""

    type: str
    wanted: str

    @property
    def fell_back(self) -> bool:
        """Whether the row length decided."""
        return self.type != self.wanted


def canonical(quant: str) -> str:
    """The full name of a quantization: lower case, aliases resolved; unknown names come back as they are."""
    name = quant.lower()
    return ALIASES.get(name, name)


def default_type(quant: str) -> str:
    """The type that most tensors of a quantization get; raises UsageError for an unknown name."""
    return _mixture(quant).default


def choose(
    quant: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    experts: int = 0,
    wide: bool = False,
    overrides: Sequence[tuple[str, str]] = (),
    pure: bool = False,
    imatrix: bool = False,
) -> dict[str, Choice]:
    """Give every tensor its type as llama-quantize does.

    `experts` is how many each layer has, 0 of a dense model.
    `wide` says that the model has the shape whose attn_v gets more bits (Architecture.wide_values).
    `shapes` are rows first, by GGUF name; without an "output.weight" the embedding counts as tied.
    `overrides` are (pattern, type): the first pattern found in a name decides its type. Unlike
    llama-quantize they also hold when `quant` is f32, f16 or bf16. `pure` takes the default type
    to every matrix. `imatrix` says that an importance matrix is used. Raises UsageError for an unknown
    type, for a pattern that is not a regular expression or fits no matrix, and for a mixture that needs an
    importance matrix without one.
    """
    mixture = _mixture(quant)
    matrices = sorted(
        (name for name in shapes if is_quantized(name, shapes[name])), key=lambda name: (_layer(name), name)
    )
    manual = overridden(matrices, overrides)
    # llama.cpp counts the tensors of a role as it meets them, layer by layer, without the overridden ones;
    # of a model of experts, of which a layer has several, those of the MLP go by the layer.
    seen = dict.fromkeys(_ROLES, 0)
    totals = dict.fromkeys(_ROLES, layers) | {"attn_v": sum(_ROLES["attn_v"] in m for m in matrices)}
    tied = "output.weight" not in shapes
    result = {name: Choice("f32", "f32") for name in shapes}
    for name in matrices:
        columns = shapes[name][-1]
        usual = mixture.flat if mixture.flat and len(shapes[name]) == 2 and not pure else mixture.default
        if name.endswith(_WIDE) and QTYPES[mixture.default].block == 1:
            usual = "f32"
        wanted = manual.get(name) or usual
        if name not in manual and not pure and QTYPES[mixture.default].block > 1:
            if name == "output.weight" or (tied and name == "token_embd.weight"):
                wanted = _output_type(mixture, columns)
            elif name == "token_embd.weight":
                wanted = mixture.embedding or usual
            elif role := next((role for role, part in _ROLES.items() if part in name), None):
                by_layer = experts > 1 and role.startswith("ffn") and not mixture.counted
                i = _layer(name) if by_layer else seen[role]
                at = Place(i, totals[role], heads // kv_heads, imatrix, experts)
                wanted = _exception(mixture, role, at, wide, usual)
                seen[role] += 1
        result[name] = Choice(fitting(wanted, columns), wanted)
    if not imatrix:
        _refuse_without_importance(quant, {name: result[name].type for name in matrices})
    return result


def choose_for(
    config: ModelConfig,
    quant: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    overrides: Sequence[tuple[str, str]] = (),
    pure: bool = False,
    imatrix: bool = False,
) -> dict[str, Choice]:
    """As `choose`, of the model that a config tells of."""
    return choose(
        quant, shapes, layers=config.layers, heads=config.heads, kv_heads=config.kv_heads,
        experts=config.experts.count if config.experts else 0,
        wide=find_architecture(config.architecture).wide_values(config),
        overrides=overrides, pure=pure, imatrix=imatrix,
    )  # fmt: skip


def _refuse_without_importance(quant: str, types: Mapping[str, str]) -> None:
    """Raise UsageError when a tensor needs an importance matrix."""
    bare = _bare(quant, types)
    if bare:
        raise UsageError(
            f"{quant} needs an importance matrix",
            why=f"levels as few as those of {types[bare[0]]} ({bare[0]}), chosen without one, lose the model",
            hint="Give --calib c4 to make one on the way, or --imatrix FILE, which dsconvert imatrix MODEL "
            "--outfile FILE makes, or take q2_k or iq3_s",
        )


def needing(quant: str) -> set[str]:
    """The types that a quantization uses for no layer without importance data."""
    return {name for name, kind in QTYPES.items() if kind.importance >= WANTED} | {_mixture(quant).wants}


def needs_importance(quant: str) -> bool:
    """Whether a quantization uses a type that needs importance data."""
    mixture = _mixture(quant)
    kinds = {mixture.default, *(kind for role in _ROLES for _, kind in mixture.rule(role))}
    return bool(kinds & needing(quant))


def _bare(quant: str, types: Mapping[str, str]) -> list[str]:
    """Of tensors without importance data, by name and type, those that may not be so.

    As in llama-quantize the embedding and the output layer, of which no matrix has data, may go without, but
    for the types that have no way to.
    """
    layers = needing(quant)
    return [
        name
        for name, kind in types.items()
        if QTYPES[kind].importance == NEEDED or (kind in layers and name not in _WHOLE_MODEL)
    ]


def check_importance(quant: str, lacking: Mapping[str, str]) -> None:
    """Raise UsageError when a tensor that needs importance data has none in the matrix.

    `lacking` are the types of the tensors without data, by name.
    """
    bare = _bare(quant, lacking)
    if bare:
        raise UsageError(
            f"{quant} needs importance data for every {lacking[bare[0]]} tensor",
            why=f"the matrix has none that fits {', '.join(bare[:3])}" + (" and others" if bare[3:] else ""),
            hint=f"Give another type to it: --tensor-type '{bare[0]}=q4_k', or take q2_k or iq3_s",
        )


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor may have another type than f32: a matrix, and neither of a norm nor of a router."""
    is_matrix = prod(shape[:-1]) > 1
    return is_matrix and name.endswith("weight") and not name.endswith(("_norm.weight", _ROUTER))


def fitting(kind: str, columns: int) -> str:
    """`kind`, or what llama-quantize takes instead when `columns` is not a multiple of its block."""
    if columns % QTYPES[kind].block:
        kind = QTYPES[kind].fallback
    return "f16" if columns % QTYPES[kind].block else kind


def _mixture(quant: str) -> Mixture:
    try:
        return MIXTURES[canonical(quant)]
    except KeyError:
        raise UsageError(
            f"quantization {quant[:40]!r} is unknown", hint=f"Take one of {', '.join(MIXTURES)}"
        ) from None


def _layer(name: str) -> int:
    found = _LAYER.search(name)
    return int(found[1]) if found else -1


def _output_type(mixture: Mixture, columns: int) -> str:
    """The output layer's type, which is the embedding's where that is used in its place."""
    default = mixture.default
    return "q8_0" if default == "q8_0" or columns % QTYPES[default].block else mixture.output


def _exception(mixture: Mixture, role: str, at: Place, wide: bool, usual: str) -> str:
    kind = next((kind for when, kind in mixture.rule(role) if when(at)), usual)
    # The architecture says that attn_v is small for the model's size, and worth more bits.
    raised = role == "attn_v" and wide and mixture.raises_wide and kind in ("q3_k", "q4_k")
    return "q5_k" if raised else kind


def overridden(matrices: Sequence[str], overrides: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The type of each matrix that a pattern fits; the first pattern wins."""
    manual: dict[str, str] = {}
    for pattern, kind in overrides:
        option = f"--tensor-type {pattern}={kind}"
        if kind not in QTYPES:
            raise UsageError(
                f"type {kind[:40]!r} is unknown", where=option, hint=f"Take one of {', '.join(QTYPES)}"
            )
        try:
            found = [name for name in matrices if re.search(pattern, name)]
        except re.error as error:
            raise UsageError(
                "the pattern is not a regular expression", where=option, why=str(error)
            ) from None
        if not found:
            raise UsageError(
                "the pattern fits no weight matrix",
                where=option,
                why="it is searched in GGUF names such as " + ", ".join([*matrices[:1], *matrices[-1:]]),
                hint="See the names with --dry-run; norms and biases always stay f32",
            )
        for name in found:
            manual.setdefault(name, kind)
    return manual
