"""The position of a tensor in a model, and the conditions on it that the rules of the mixtures use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: the i-th of its role among n, and what its model and run are like."""

    i: int
    n: int
    heads_per_kv: int
    imatrix: bool
    experts: int = 0


When = Callable[[Place], bool]
Rule = tuple[tuple[When, str], ...]  # the first that holds decides the type; none: the mixture's default


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


def middle(at: Place) -> bool:
    """All but the first and the last eighth of the layers."""
    return at.n // 8 <= at.i < 7 * at.n // 8


def without_imatrix(at: Place) -> bool:
    """Every layer, when no importance matrix is used."""
    return not at.imatrix


def first_eighth_without_imatrix(at: Place) -> bool:
    """The first eighth of the layers, when no importance matrix is used."""
    return not at.imatrix and first_eighth(at)


def four_heads_or_experts(at: Place) -> bool:
    """Four heads or more on each key-value head, or four experts or more."""
    return four_heads_per_kv(at) or at.experts >= 4


def eight_experts(at: Place) -> bool:
    """Every layer of a model of eight experts."""
    return at.experts == 8


def first_eighth_or_more_of_eight(at: Place) -> bool:
    """The first eighth of the layers; of a model of eight experts, those of `more_bits` too."""
    return first_eighth(at) or (eight_experts(at) and more_bits(at))
