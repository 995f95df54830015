"""Which type each tensor of a file gets: the mixtures of llama-quantize as tables.

The rules are those of llama.cpp's src/llama-quant.cpp (llama_tensor_get_type) for the Llama layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from converters.gguf.qtypes import QTYPES
from dsconvert.errors import UsageError


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: the i-th of its role among n, and what its model and run are like."""

    i: int
    n: int
    heads_per_kv: int
    imatrix: bool


When = Callable[[Place], bool]
Rule = tuple[tuple[When, str], ...]  # the first that holds gives the type; none: the mixture's default


def always(at: Place) -> bool:
    """Every layer."""
    return True


def more_bits(at: Place) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    eighth = at.n // 8
    return at.i < eighth or at.i >= 7 * at.n // 8 or (at.i - eighth) % 3 == 2


def first_two(at: Place) -> bool:
    """The first two layers."""
    return at.i < 2


def first_four(at: Place) -> bool:
    """The first four layers."""
    return at.i < 4


def first_eighth(at: Place) -> bool:
    """The first eighth of the layers."""
    return at.i < at.n // 8


def first_sixteenth(at: Place) -> bool:
    """The first sixteenth of the layers."""
    return at.i < at.n // 16


def first_eighth_with_imatrix(at: Place) -> bool:
    """The first eighth of the layers, when an importance matrix is used."""
    return at.imatrix and first_eighth(at)


def four_heads_per_kv(at: Place) -> bool:
    """Grouped-query attention with at least four heads on each key-value head."""
    return at.heads_per_kv >= 4


@dataclass(frozen=True)
class Mixture:
    """What `--quant NAME` means: general.file_type, the type of most tensors, and the exceptions by role."""

    file_type: int
    default: str
    attn_v: Rule = ()
    ffn_down: Rule = ()
    attn_output: Rule = ()
    needs_imatrix: bool = False


MIXTURES: dict[str, Mixture] = {
    "f32": Mixture(0, "f32"),
    "f16": Mixture(1, "f16"),
    "bf16": Mixture(32, "bf16"),
    "q8_0": Mixture(7, "q8_0"),
    "q4_0": Mixture(2, "q4_0", ffn_down=((first_eighth_with_imatrix, "q4_1"),)),
    "q4_1": Mixture(3, "q4_1"),
    "q5_0": Mixture(8, "q5_0", ffn_down=((first_eighth_with_imatrix, "q5_1"),)),
    "q5_1": Mixture(9, "q5_1"),
    "q2_k": Mixture(
        10,
        "q2_k",
        attn_v=((four_heads_per_kv, "q4_k"), (always, "q3_k")),
        ffn_down=((always, "q3_k"),),
        attn_output=((always, "q3_k"),),
    ),
    "q2_k_s": Mixture(
        21,
        "q2_k",
        attn_v=((four_heads_per_kv, "q4_k"),),
        ffn_down=((first_eighth, "q4_k"),),
        needs_imatrix=True,
    ),
    "q3_k_s": Mixture(11, "q3_k"),
    "q3_k_m": Mixture(
        12,
        "q3_k",
        attn_v=((first_two, "q5_k"), (always, "q4_k")),
        ffn_down=((first_sixteenth, "q5_k"), (always, "q4_k")),
        attn_output=((always, "q4_k"),),
    ),
    "q3_k_l": Mixture(
        13,
        "q3_k",
        attn_v=((always, "q5_k"),),
        ffn_down=((always, "q5_k"),),
        attn_output=((always, "q5_k"),),
    ),
    "q4_k_s": Mixture(14, "q4_k", attn_v=((first_four, "q5_k"),), ffn_down=((first_eighth, "q5_k"),)),
    "q4_k_m": Mixture(15, "q4_k", attn_v=((more_bits, "q6_k"),), ffn_down=((more_bits, "q6_k"),)),
    "q5_k_s": Mixture(16, "q5_k"),
    "q5_k_m": Mixture(17, "q5_k", attn_v=((more_bits, "q6_k"),), ffn_down=((more_bits, "q6_k"),)),
    "q6_k": Mixture(18, "q6_k"),
}
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
FILE_TYPES: dict[str, int] = {name: mixture.file_type for name, mixture in MIXTURES.items()}

# The names that llama.cpp counts by role.
_ROLES = {"attn_v": "attn_v.weight", "ffn_down": "ffn_down", "attn_output": "attn_output.weight"}
_WHOLE_MODEL = ("token_embd.weight", "output.weight")
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
    overrides: Sequence[tuple[str, str]] = (),
    pure: bool = False,
    imatrix: bool = False,
) -> dict[str, Choice]:
    """Give every tensor its type as llama-quantize does.

    `shapes` are rows first, by GGUF name; without an "output.weight" the embedding counts as tied.
    `overrides` are (pattern, type): the first pattern found in a name gives its type. Unlike
    llama-quantize they also hold when `quant` is f32, f16 or bf16. `pure` gives the default type
    to every matrix. `imatrix` says that an importance matrix is used. Raises UsageError for an unknown
    type, for a pattern that is no regular expression or fits no matrix, and for a mixture that needs an
    importance matrix without one.
    """
    mixture = _mixture(quant)
    if mixture.needs_imatrix and not imatrix:
        raise UsageError(
            f"{quant} needs an importance matrix",
            why="2-bit levels chosen without one lose the model",
            hint="Give --imatrix FILE or --calib c4, or take q2_k",
        )
    matrices = sorted((name for name in shapes if is_quantized(name, shapes[name])), key=_layer)
    manual = _overridden(matrices, overrides)
    # llama.cpp counts the tensors of a role as it meets them, layer by layer, without the overridden ones.
    seen = dict.fromkeys(_ROLES, 0)
    totals = dict.fromkeys(_ROLES, layers) | {"attn_v": sum(_ROLES["attn_v"] in m for m in matrices)}
    wide = layers == 80 and heads != kv_heads
    tied = "output.weight" not in shapes
    result = {name: Choice("f32", "f32") for name in shapes}
    for name in matrices:
        columns = shapes[name][-1]
        wanted = manual.get(name) or mixture.default
        if name not in manual and not pure and QTYPES[mixture.default].block > 1:
            if name == "output.weight" or (tied and name == "token_embd.weight"):
                wanted = _output_type(mixture.default, columns)
            elif role := next((role for role, part in _ROLES.items() if part in name), None):
                at = Place(seen[role], totals[role], heads // kv_heads, imatrix)
                wanted = _exception(mixture, role, at, wide)
                seen[role] += 1
        result[name] = Choice(fitting(wanted, columns), wanted)
    return result


def check_importance(quant: str, lacking: Mapping[str, str]) -> None:
    """Raise UsageError when a mixture that needs an importance matrix has no data for one of its tensors.

    `lacking` are the types of the tensors without data, by name. As in llama-quantize the embedding and the
    output layer, of which no matrix has data, may go without, and so may other types than the mixture's own.
    """
    mixture = _mixture(quant)
    bare = [name for name, kind in lacking.items() if kind == mixture.default and name not in _WHOLE_MODEL]
    if mixture.needs_imatrix and bare:
        raise UsageError(
            f"{quant} needs importance data for every {mixture.default} tensor",
            why=f"the matrix has none that fits {', '.join(bare[:3])}" + (" and others" if bare[3:] else ""),
            hint=f"Give another type to it: --tensor-type '{bare[0]}=q4_k', or take q2_k",
        )


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor may have another type than f32: a matrix, and not of a norm."""
    is_matrix = prod(shape[:-1]) > 1
    return is_matrix and name.endswith("weight") and not name.endswith("_norm.weight")


def fitting(kind: str, columns: int) -> str:
    """`kind`, or what llama-quantize takes instead when `columns` is no multiple of its block."""
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


def _output_type(default: str, columns: int) -> str:
    """The output layer's type, which is the embedding's where that is used in its place."""
    return "q8_0" if default == "q8_0" or columns % QTYPES[default].block else "q6_k"


def _exception(mixture: Mixture, role: str, at: Place, wide: bool) -> str:
    rule: Rule = getattr(mixture, role)
    kind = next((kind for when, kind in rule if when(at)), mixture.default)
    # Llama 2 70B's shape (80 layers, grouped queries): its small attn_v is worth more bits.
    return "q5_k" if role == "attn_v" and wide and kind in ("q3_k", "q4_k") else kind


def _overridden(matrices: Sequence[str], overrides: Sequence[tuple[str, str]]) -> dict[str, str]:
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
            raise UsageError("the pattern is no regular expression", where=option, why=str(error)) from None
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
