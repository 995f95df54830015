"""What shapes and sets of linears exllamav2 can run, checked before any work."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from converters.exl2.settings import COLUMNS
from dsconvert.errors import QuantizationError

HEAD_WEIGHT = "lm_head.weight"
# What a block runs as one kernel, by the last part of names.
WHOLE = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "MLP": ("gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class Rule:
    """`holds(outputs, inputs)` must be true for exllamav2 to run a linear; `text` says it.

    A rule that is not `for_head` spares the head.
    """

    text: str
    holds: Callable[[int, int], bool]
    for_head: bool = True


# As of exllamav2 0.3.2. Its limit of 32767 rows of words, first rows being int16, holds by the second rule:
# 65535 inputs of 8 bits are 16384 rows. Columns that pad the outputs are masked in logits only.
RULES = (
    Rule("inputs are a multiple of 32", lambda n, k: k % 32 == 0),
    Rule("inputs are 65535 at the most", lambda n, k: k <= 65535),
    Rule("outputs are a multiple of 32, but for the head", lambda n, k: n % COLUMNS == 0, False),
)


def check_shapes(linears: Mapping[str, tuple[int, ...]], others: Collection[str] = ()) -> None:
    """Refuse what exllamav2 could not run, before any work.

    `linears` are the weights to be quantized, shapes [outputs, inputs] by tensor name, the head among them
    where it is; `others` the names of those that stay. Raises QuantizationError that names the rule and the
    tensor: a shape, or an attention or MLP quantized in part. The head may stay, whatever its shape.
    """
    for name, shape in linears.items():
        if len(shape) != 2 or not name.endswith(".weight") or 0 in shape:
            raise QuantizationError(
                f"is not the weight of a linear: shape {list(shape)}", where=name, hint="Leave it in 16 bits"
            )
    for rule, name in broken_rules(linears):
        outputs, inputs = linears[name]
        raise QuantizationError(
            f"breaks a rule of exllamav2: {rule.text}",
            where=name,
            why=f"It has {outputs} outputs and {inputs} inputs",
            hint="Leave the head in 16 bits with --head-bits 16"
            if name == HEAD_WEIGHT
            else "exllamav2 cannot run this model in EXL2; use dsconvert gguf",
        )
    _check_whole(linears, others)


def broken_rules(linears: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[Rule, str]]:
    """Every rule that a linear breaks, with the linear's name, by rule."""
    for rule in RULES:
        for name, (outputs, inputs) in linears.items():
            if (rule.for_head or name != HEAD_WEIGHT) and not rule.holds(outputs, inputs):
                yield rule, name


def _check_whole(linears: Collection[str], others: Collection[str]) -> None:
    rest = set(others)
    for name in linears:
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        for kind, members in WHOLE.items():
            left = [f"{stem}.{member}.weight" for member in members if f"{stem}.{member}.weight" in rest]
            if last in members and left:
                raise QuantizationError(
                    f"breaks a rule of exllamav2: the {kind} of a block is quantized whole or not at all",
                    where=name,
                    why=f"{left[0]} stays in 16 bits",
                    hint="Quantize " + ", ".join(members) + " all or none",
                )
