"""Rules of readers on the shapes of quantized linears: which refuses what, by name, before any work."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsconvert.errors import QuantizationError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rule:
    """`holds(outputs, inputs, layout)` must be true for `runtime` to read a linear; `text` says it.

    `layout` are a format's settings. The runtime "format" stands for every reader.
    """

    runtime: str
    text: str
    holds: Callable[[int, int, Any], bool]


@dataclass(frozen=True)
class Broken:
    """A rule that the linear called `tensor` breaks."""

    rule: Rule
    tensor: str
    shape: tuple[int, ...]

    @property
    def text(self) -> str:
        """One line that names rule, tensor and shape."""
        return f"{self.rule.runtime}: {self.rule.text}; {self.tensor} is {list(self.shape)}"


def check_linears(linears: Shapes) -> None:
    """Refuse what is not the weight of a linear [outputs, inputs]; raises QuantizationError."""
    for name, shape in linears.items():
        if len(shape) != 2 or not name.endswith(".weight"):
            raise QuantizationError(
                f"is not the weight of a linear: shape {list(shape)}", where=name, hint="Leave it in 16 bits"
            )


def check_rules(
    rules: Sequence[Rule], linears: Shapes, layout: object, runtimes: Collection[str], named: str
) -> None:
    """Refuse the first linear that breaks a rule of one of `runtimes`; raises QuantizationError.

    `named` says the settings in words.
    """
    for broken in broken_rules(rules, linears, layout):
        if broken.rule.runtime in runtimes:
            outputs, inputs = broken.shape
            raise QuantizationError(
                f"breaks a rule of {broken.rule.runtime}: {broken.rule.text}",
                where=broken.tensor,
                why=f"It has {outputs} outputs and {inputs} inputs, {named}",
                hint="Leave this linear in 16 bits, or choose other settings",
            )


def broken_rules(rules: Sequence[Rule], linears: Shapes, layout: object) -> Iterator[Broken]:
    """Every rule that a linear breaks, by rule; what is not refused can become a warning."""
    for rule in rules:
        for name, (outputs, inputs) in linears.items():
            if not rule.holds(outputs, inputs, layout):
                yield Broken(rule, name, (outputs, inputs))


def refusing_runtimes(rules: Sequence[Rule], linears: Shapes, layout: object) -> dict[str, str]:
    """The runtimes that will not read these linears, each with the first rule and tensor in its way."""
    first: dict[str, str] = {}
    for broken in broken_rules(rules, linears, layout):
        first.setdefault(broken.rule.runtime, broken.text)
    return first
