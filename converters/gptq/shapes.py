"""What shapes and settings the readers of GPTQ files accept, checked before any work."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from dsconvert.errors import QuantizationError, UsageError
from dsconvert.quantization import shape_rules
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.shape_rules import Broken, Rule

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, -1)
RUNTIMES = ("format", "gptqmodel", "exllamav2", "vllm")
# What transformers (with optimum 2.3) does: it makes quantized linears in the blocks alone.
HEAD_RULE = "it takes the head in 16 bits only, and would make up one at random"
# What transformers 5.23 does: it says that tensors are missing, and goes on.
EXPERTS_RULE = (
    "it fuses experts, and would make them up at random; gptqmodel's own loader reads experts that are named "
    "gate_proj, up_proj and down_proj, of classes that it knows"
)
# Linears that runtimes fuse into one, by the last part of their names.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Layout:
    """The settings that readers care about; see grid.Scheme. `desc_act`: groups are not runs of inputs."""

    scheme: Scheme
    desc_act: bool = False
    checkpoint_format: str = "gptq"


def _whole_groups(inputs: int, layout: Layout) -> bool:
    return inputs % layout.scheme.width(inputs) == 0


# "format" holds for every reader. The others as of gptqmodel 7.7, exllamav2 0.3.2, vLLM 0.32 (Marlin).
RULES = (
    Rule("format", "inputs are a multiple of 32", lambda n, k, at: k % 32 == 0),
    Rule("format", "outputs are a multiple of 32", lambda n, k, at: n % 32 == 0),
    Rule(
        "gptqmodel",
        "asymmetric files are read in the gptq_v2 format only, or from its own hand",
        lambda n, k, at: at.scheme.sym or at.checkpoint_format == "gptq_v2",
    ),
    Rule("exllamav2", "4 bits only", lambda n, k, at: at.scheme.bits == 4),
    Rule("exllamav2", "inputs are 65535 at the most", lambda n, k, at: k <= 65535),
    Rule("exllamav2", "the gptq format only", lambda n, k, at: at.checkpoint_format == "gptq"),
    Rule("vllm", "4 or 8 bits only", lambda n, k, at: at.scheme.bits in (4, 8)),
    Rule("vllm", "symmetric only", lambda n, k, at: at.scheme.sym),
    Rule("vllm", "no desc_act with groups", lambda n, k, at: not at.desc_act),
    Rule("vllm", "the gptq format only", lambda n, k, at: at.checkpoint_format == "gptq"),
    Rule(
        "vllm",
        "outputs a multiple of 64 and inputs of 128, or outputs of 128 and inputs of 64",
        lambda n, k, at: (n % 64 == 0 and k % 128 == 0) or (n % 128 == 0 and k % 64 == 0),
    ),
    Rule("vllm", "inputs are a multiple of the group size", lambda n, k, at: _whole_groups(k, at)),
)


def check_shapes(
    linears: Mapping[str, tuple[int, ...]],
    layout: Layout,
    others: Collection[str] = (),
    runtimes: Collection[str] = ("format",),
) -> None:
    """Refuse what the named runtimes could not read, before any work.

    `linears` are the weights to be quantized, shapes [outputs, inputs] by tensor name; `others` the names of
    those that stay. Raises UsageError for settings no reader knows, QuantizationError that names the rule
    and the tensor: a shape rule of "format" or of one of `runtimes`, or a fused group quantized in part.
    """
    _check_settings(layout, runtimes)
    shape_rules.check_linears(linears)
    _check_fused(linears, others)
    shape_rules.check_rules(RULES, linears, layout, ("format", *runtimes), _named(layout))


def broken_rules(linears: Mapping[str, tuple[int, ...]], layout: Layout) -> Iterator[Broken]:
    """Every rule that a linear breaks, by rule; what is not refused can become a warning."""
    return shape_rules.broken_rules(RULES, linears, layout)


def refusing_runtimes(linears: Mapping[str, tuple[int, ...]], layout: Layout) -> dict[str, str]:
    """The runtimes that will not read these linears, each with the first rule and tensor in its way."""
    return shape_rules.refusing_runtimes(RULES, linears, layout)


def _check_settings(layout: Layout, runtimes: Collection[str]) -> None:
    scheme = layout.scheme
    if scheme.bits not in BITS:
        raise UsageError(f"{scheme.bits} bits are not a GPTQ format", hint="Use --bits " + _either(BITS))
    if scheme.group_size not in GROUP_SIZES:
        hint = "Use --group-size " + _either(GROUP_SIZES)
        raise UsageError(f"groups of {scheme.group_size} are not read everywhere", hint=hint)
    if layout.checkpoint_format not in ("gptq", "gptq_v2"):
        raise UsageError(f"checkpoint format {layout.checkpoint_format!r} is unknown", hint="Use gptq")
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown:
        raise UsageError(f"runtime {unknown[0]!r} is unknown", hint="Known: " + ", ".join(RUNTIMES))


def _check_fused(linears: Collection[str], others: Collection[str]) -> None:
    """Runtimes merge q, k, v and gate, up: each must be quantized as a whole or not at all."""
    rest = set(others)
    for name in linears:
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        for member in next((group for group in FUSED if last in group), ()):
            left = f"{stem}.{member}.weight"
            if left in rest:
                raise QuantizationError(
                    "would be quantized without a linear that runtimes fuse with it",
                    where=name,
                    why=f"{left} stays in 16 bits",
                    hint="Quantize " + ", ".join(next(g for g in FUSED if last in g)) + " all or none",
                )


def _named(layout: Layout) -> str:
    scheme = layout.scheme
    kind = "symmetric" if scheme.sym else "asymmetric"
    return f"{scheme.bits} bits, {kind}, group {scheme.group_size}, format {layout.checkpoint_format}"


def _either(values: Collection[int]) -> str:
    return ", ".join(map(str, values))
