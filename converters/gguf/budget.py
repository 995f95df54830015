"""Which types each tensor of a GGUF file may have, and what they take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from converters.gguf import mixtures
from converters.gguf.layout import padded
from converters.gguf.mixtures import Choice
from converters.gguf.output import Options
from converters.gguf.qtypes import QTYPES
from dsconvert.errors import UsageError
from dsconvert.models.tensor_table import SOLVE_ORDER, Spec
from dsconvert.quantization.allocate import Option
from dsconvert.quantization.budget import Budget, Nats

# What a tensor may get where nothing else is asked: fast everywhere, and no type needs an importance matrix.
USUAL = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
Types = Mapping[str, tuple[str, ...]]  # what each tensor may get, by GGUF name


def candidates(budget: Budget, specs: Iterable[Spec], overrides: Sequence[tuple[str, str]]) -> Types:
    """What each tensor with a measurable cost may get, the smallest first.

    Those are the weights of linears, experts, the head and the embedding. A type whose blocks a row does not
    fill stands for the one that llama-quantize takes instead. Raises UsageError for an unknown type and for a
    floor above all types.
    """
    usual = budget.types or USUAL
    unknown = [name for name in (*usual, budget.floor or "f32") if name not in QTYPES]
    if unknown:
        raise UsageError(f"type {unknown[0][:40]!r} is unknown", hint=f"Take some of {', '.join(QTYPES)}")
    least = QTYPES[budget.floor].bits if budget.floor else 0.0
    allowed = [name for name in usual if QTYPES[name].bits >= least]
    if not allowed:
        raise UsageError(
            f"--floor {budget.floor} leaves none of the types",
            why=f"they are {', '.join(usual)}",
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
    """Whether a tensor's cost can be told: it is multiplied by, or looked up in, on any text.

    What an indexer leaves out depends on longer texts than those that are measured.
    """
    known = spec.role in (*SOLVE_ORDER, "latent", "head", "embed") and ".indexer." not in spec.gguf
    return known and spec.gguf.endswith(".weight")


def typed(
    shapes: Mapping[str, tuple[int, ...]], chosen: Mapping[str, str], usual: Mapping[str, Choice]
) -> dict[str, Choice]:
    """The type of every tensor: as chosen, or as `usual` where there was nothing to choose."""
    return {name: Choice(chosen[name], chosen[name]) if name in chosen else usual[name] for name in shapes}


def options_of(
    types: Types, shapes: Mapping[str, tuple[int, ...]], nats: Nats
) -> dict[str, dict[str, Option]]:
    """The options of each tensor by type: the bits that it takes and the nats that it costs."""
    return {
        name: {kind: Option(tensor_bits(shapes[name], kind), nats[name][kind]) for kind in kinds}
        for name, kinds in types.items()
    }


def tensor_bits(shape: tuple[int, ...], kind: str) -> int:
    """Bits of a tensor in a file, with what the next one's alignment asks for."""
    return 8 * padded(QTYPES[kind].nbytes(math.prod(shape)))
