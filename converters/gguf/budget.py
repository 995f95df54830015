"""How big a file of types chosen by cost may be, which types each tensor may have, and the choice itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from converters.gguf import mixtures
from converters.gguf.layout import padded
from converters.gguf.mixtures import Choice
from converters.gguf.output import Options
from converters.gguf.qtypes import QTYPES
from dsconvert.errors import UsageError
from dsconvert.memory.model import decoder_of
from dsconvert.memory.peak import Card, peak
from dsconvert.memory.runtimes import RUNTIMES
from dsconvert.models.config import ModelConfig
from dsconvert.models.tensor_table import HEADS_TURNED, SOLVE_ORDER, Spec
from dsconvert.quantization.allocate import Allocation, Option, allocate, curve

# What a tensor may get where nothing else is asked: fast everywhere, and no type needs an importance matrix.
USUAL = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
Types = Mapping[str, tuple[str, ...]]  # what each tensor may get, by GGUF name
Nats = Mapping[str, Mapping[str, float]]  # what that costs


@dataclass(frozen=True)
class Budget:
    """What was asked for: bits per weight of the file, bytes of it, or of a card's memory at a context.

    `types` are what a tensor may get, none below `floor`; `measurement` keeps the costs for other sizes.
    `chosen` are the types by GGUF name, the smallest until they are chosen.
    """

    bpw: float | None = None
    size: int | None = None
    vram: int | None = None
    context: int | None = None
    types: tuple[str, ...] = USUAL
    floor: str | None = None
    measurement: Path | None = None
    chosen: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """It as a part of a file's name."""
        if self.bpw is not None:
            return f"{self.bpw:g}bpw"
        if self.size is not None:
            return _named(self.size, 1000)
        return f"{_named(self.vram or 0, 1024)}-card"


def _named(nbytes: int, unit: int) -> str:
    power = 3 if nbytes >= unit**3 else 2
    return f"{nbytes / unit**power:.4g}{ {2: 'MB', 3: 'GB'}[power] }"


def candidates(budget: Budget, specs: Iterable[Spec], overrides: Sequence[tuple[str, str]]) -> Types:
    """What each tensor with a measurable cost may get, the smallest first.

    Those are the weights of linears, the head and the embedding, as far as they are stored row by row. A type
    whose blocks a row does not fill stands for the one that llama-quantize takes instead. Raises UsageError
    for an unknown type and for a floor above all types.
    """
    unknown = [name for name in (*budget.types, budget.floor or "f32") if name not in QTYPES]
    if unknown:
        raise UsageError(f"type {unknown[0][:40]!r} is unknown", hint=f"Take some of {', '.join(QTYPES)}")
    least = QTYPES[budget.floor].bits if budget.floor else 0.0
    allowed = [name for name in budget.types if QTYPES[name].bits >= least]
    if not allowed:
        raise UsageError(
            f"--floor {budget.floor} leaves none of the types",
            why=f"they are {', '.join(budget.types)}",
            hint="Give a lower --floor, or wider --types",
        )
    matrices = [spec for spec in specs if mixtures.is_quantized(spec.gguf, spec.shape)]
    manual = mixtures.overridden([spec.gguf for spec in matrices], overrides)
    found = {}
    for spec in filter(is_measurable, matrices):
        own = [manual[spec.gguf]] if spec.gguf in manual else allowed
        fitting = dict.fromkeys(mixtures.fitting(name, spec.shape[-1]) for name in own)
        found[spec.gguf] = tuple(sorted(fitting, key=lambda name: (QTYPES[name].bits, name)))
    return found


def smallest(options: Options, specs: Iterable[Spec]) -> Options:
    """The options with the smallest type of each tensor chosen, and the outputs named by the budget."""
    assert options.budget is not None
    types = candidates(options.budget, specs, options.overrides)
    chosen = replace(options.budget, chosen={name: kinds[0] for name, kinds in types.items()})
    return replace(options, budget=chosen, quants=(chosen.name,))


def is_measurable(spec: Spec) -> bool:
    """Whether a tensor's cost can be told from its rows: it holds those of whole weights as they are."""
    whole = spec.row.part is None and spec.row.transform is not HEADS_TURNED
    return whole and spec.gguf.endswith(".weight") and spec.role in (*SOLVE_ORDER, "head", "embed")


def typed(
    shapes: Mapping[str, tuple[int, ...]], chosen: Mapping[str, str], usual: Mapping[str, Choice]
) -> dict[str, Choice]:
    """The type of every tensor: as chosen, or as `usual` where there was nothing to choose."""
    return {name: Choice(chosen[name], chosen[name]) if name in chosen else usual[name] for name in shapes}


@dataclass(frozen=True)
class Chosen:
    """Types by GGUF name, the bits of their tensors, the nats they are foretold to cost, and the curve.

    `curve` are pairs of bits and nats: what other numbers of bits would buy.
    """

    types: dict[str, str]
    bits: int
    nats: float
    curve: tuple[tuple[int, float], ...]


def choose(types: Types, shapes: Mapping[str, tuple[int, ...]], nats: Nats, bits: int, asked: str) -> Chosen:
    """The types of least cost within `bits`; raises UsageError, which names what was `asked`, for too few."""
    slots = [
        [Option(tensor_bits(shapes[name], kind), nats[name][kind]) for kind in kinds]
        for name, kinds in types.items()
    ]
    least = sum(min(option.bits for option in slot) for slot in slots)
    if least > bits:
        short = math.ceil((least - bits) / 8)
        raise UsageError(
            f"no choice of types is as small as {asked}",
            why=f"The smallest of each tensor takes {short:,} bytes more",
            hint="Ask for more, or for more types with --types, smaller ones",
        )
    found: Allocation = allocate(slots, bits, sum(math.prod(shapes[name]) for name in types))
    picked = {name: kinds[at] for (name, kinds), at in zip(types.items(), found.choice, strict=True)}
    return Chosen(picked, found.bits, found.error, tuple(curve(slots)))


def tensor_bits(shape: tuple[int, ...], kind: str) -> int:
    """Bits of a tensor in a file, with what the next one's alignment asks for."""
    return 8 * padded(QTYPES[kind].nbytes(math.prod(shape)))


def card_bytes(config: ModelConfig, vram: int, context: int) -> int:
    """What weights may take on a card of `vram` bytes that also holds a context, in llama.cpp.

    Raises UsageError where the context alone is too much.
    """
    card = Card(0, config.layers, head=True)
    left = vram - peak(decoder_of(config), [card], RUNTIMES["llama.cpp"], 16, 1, context).total
    if left <= 0:
        raise UsageError(
            f"a context of {context} tokens does not fit the card",
            why=f"Its cache and what runs take {vram - left:,} bytes of {vram:,}",
            hint="Give a smaller --context, or a larger --vram",
        )
    return left
