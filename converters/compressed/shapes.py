"""What shapes the readers of compressed-tensors folders accept, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping

from converters.compressed.schemes import GROUP_SIZES, Row
from dsconvert.errors import UsageError
from dsconvert.quantization import shape_rules
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.shape_rules import Rule

# "format" holds for every reader: the package reads whole groups, and dsconvert packs 32 codes at a time.
# Of vLLM 0.32 the kernel for 4 and 8 bits (Marlin), which it looks for first.
RULES = (
    Rule("format", "inputs are a multiple of 32", lambda n, k, at: k % 32 == 0),
    Rule("format", "inputs are a multiple of the group size", lambda n, k, at: k % at.width(k) == 0),
    Rule(
        "vllm",
        "outputs a multiple of 64 and inputs of 128, or outputs of 128 and inputs of 64",
        lambda n, k, at: (n % 64 == 0 and k % 128 == 0) or (n % 128 == 0 and k % 64 == 0),
    ),
    Rule("sglang", "4 or 8 bits only", lambda n, k, at: at.bits in (4, 8)),
)


def check_group(scheme: Scheme) -> None:
    """Raises UsageError for a group size that readers have no kernels for."""
    if scheme.group_size not in GROUP_SIZES:
        raise UsageError(
            f"groups of {scheme.group_size} are not read everywhere",
            hint="Use --group-size " + ", ".join(map(str, GROUP_SIZES)),
        )


def fits(shape: tuple[int, ...], scheme: Scheme) -> bool:
    """Whether readers of the format could read a linear [N, K] of this scheme."""
    outputs, inputs = shape
    return all(rule.holds(outputs, inputs, scheme) for rule in RULES if rule.runtime == "format")


def check_shapes(linears: Mapping[str, tuple[int, ...]], scheme: Scheme) -> None:
    """Refuse what no reader of the format could read: QuantizationError by the rule's and the tensor's name.

    Raises UsageError for a group size that readers have no kernels for.
    """
    check_group(scheme)
    kind = "symmetric" if scheme.sym else "asymmetric"
    named = f"{scheme.bits} bits, {kind}, group {scheme.group_size}"
    shape_rules.check_linears(linears)
    shape_rules.check_rules(RULES, linears, scheme, ("format",), named)


def check_floats(linears: Mapping[str, tuple[int, ...]], scheme: Row) -> None:
    """As `check_shapes`, for a scheme of small floats, whose groups are of one size."""
    text = f"inputs are a multiple of {scheme.width}"
    rule = Rule("format", text, lambda n, k, at: k % scheme.width == 0)
    shape_rules.check_linears(linears)
    shape_rules.check_rules((rule,), linears, scheme, ("format",), scheme.name)


def refusing_runtimes(
    linears: Mapping[str, tuple[int, ...]], schemes: Mapping[str, Scheme]
) -> dict[str, str]:
    """The runtimes that will not read these linears, each with the first rule and tensor in its way."""
    found: dict[str, str] = {}
    for scheme in dict.fromkeys(schemes.values()):
        own = {name: shape for name, shape in linears.items() if schemes[name] == scheme}
        found = shape_rules.refusing_runtimes(RULES, own, scheme) | found
    return found
